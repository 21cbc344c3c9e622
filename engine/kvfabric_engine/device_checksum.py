"""XXH3-128 of parts in device memory: what a load verifies is what lies where it is used from.

The algorithm is XXH3 for long input with its default secret and seed 0, as xxhash 0.8 has it. Its eight
64-bit accumulators take in 64-byte stripes; after sixteen stripes, 1 KiB, they are scrambled, and only that
is sequential: within a KiB the stripes are added up. So there are two steps on the device,

    block sums   what each KiB adds to each accumulator, all of them at once: bound by memory, as a copy is
    chain        one KiB after the other, a few instructions each; all parts and lanes side by side

and the last mixing, of 64 bytes a part, on the host. Triton kernels on CUDA, torch elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU comes without it
    triton = None

STRIPE_BYTES, BLOCK_STRIPES, LANES = 64, 16, 8
BLOCK_BYTES = BLOCK_STRIPES * STRIPE_BYTES
ACCUMULATOR_BYTES = 8 * LANES
SHORT_BYTES = 240
"""Up to this XXH3 is another algorithm."""
BLOCKS_A_PROGRAM = 16
UNROLL = 32
"""Sums loaded before the first is needed: the chain would otherwise wait for memory at each KiB."""

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_START = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)
_LAST_STRIPE_KEY, _SCRAMBLE_KEY, _LOW_KEY, _HIGH_KEY = 121, 128, 11, 117
"""Offsets into the secret."""
_LOW32 = 0xFFFFFFFF
_MASK64 = (1 << 64) - 1

Words = npt.NDArray[np.uint64]


class DeviceChecksums:
    """Of parts of one size on one device."""

    def __init__(self, device: torch.device, part_bytes: int) -> None:
        if not supports(part_bytes):
            raise ValueError(f"parts of {part_bytes} B have no checksum on a device")
        self._words = part_bytes // 8
        stripes = part_bytes // STRIPE_BYTES
        self._num_blocks = (part_bytes - 1) // BLOCK_BYTES  # whole ones, each scrambled after it
        self._last_stripes = stripes - BLOCK_STRIPES * self._num_blocks - 1
        self._uses_kernel = triton is not None and device.type == "cuda"
        key = np.frombuffer(_SECRET, "<u8")
        stripe, lane = np.divmod(np.arange(BLOCK_STRIPES * LANES), LANES)
        self._keys = _to_device(key[stripe + lane], device)  # [16 * 8], of a block's words
        self._scramble = _to_device(_key(_SCRAMBLE_KEY), device)
        self._last = _to_device(_key(_LAST_STRIPE_KEY), device)
        self._start = _to_device(np.array(_START, np.uint64), device)
        self._merge_keys = np.stack([_key(_HIGH_KEY), _key(_LOW_KEY)])
        starts = [~(part_bytes * _P64_2) & _MASK64, part_bytes * _P64_1 & _MASK64]
        self._merge_start = np.array(starts, np.uint64)

    def accumulate(self, parts: torch.Tensor) -> torch.Tensor:
        """`parts`: contiguous uint8 [n * part_bytes]. Enqueued on the current stream; int64 [n, 8]."""
        words = parts.view(torch.int64).view(-1, self._words)
        if not self._uses_kernel:
            return self._chain(words, self._sums(words))
        order = torch.arange(len(words), device=words.device)
        paged = _Paged(words, order, 1, self._words)
        sums = self._empty_sums(paged)
        self._sum(paged, sums, 0, self._num_blocks + 1)
        return self._chain_sums(paged, sums)

    def begin_paged(self, region: torch.Tensor, pages: torch.Tensor) -> PagedSums:
        """As `accumulate`, of parts that lie in pages and come there bit by bit: `region` uint8
        [num_pages, page_bytes] with contiguous rows, `pages` int64 [n * pages a part] on the device. See
        `supports_pages`."""
        page_bytes = region.shape[1]
        paged = _Paged(
            region.view(torch.int64), pages, 8 * self._words // page_bytes, page_bytes // 8
        )
        return PagedSums(region, paged, self._empty_sums(paged) if self._uses_kernel else None)

    def add_paged(self, begun: PagedSums, start: int, num_bytes: int) -> None:
        """Of each page bytes [start, start + num_bytes) are there, whole KiB. Enqueued, as the next."""
        if begun.sums is not None and num_bytes:
            self._sum(begun.paged, begun.sums, start // BLOCK_BYTES, num_bytes // BLOCK_BYTES)

    def accumulate_paged(self, begun: PagedSums) -> torch.Tensor:
        """Everything was added; int64 [n, 8]."""
        if begun.sums is None:
            return self.accumulate(begun.region[begun.paged.pages].reshape(-1))
        return self._chain_sums(begun.paged, begun.sums)

    def digests(self, accumulators: torch.Tensor) -> list[bytes]:
        """`accumulators`, on the host, as checksums: XXH3-128, 16 B big-endian each."""
        lanes: Words = accumulators.numpy().view(np.uint64)
        keyed = np.bitwise_xor(lanes[:, None], self._merge_keys)  # [n, halves, 8]
        halves = self._merge_start + _multiply_fold(keyed[..., ::2], keyed[..., 1::2]).sum(axis=2)
        halves ^= halves >> np.uint64(37)
        halves *= np.uint64(0x165667919E3779F9)
        halves ^= halves >> np.uint64(32)
        packed = halves.astype(">u8").tobytes()
        return [packed[start : start + 16] for start in range(0, len(packed), 16)]

    def _empty_sums(self, paged: _Paged) -> torch.Tensor:
        count = len(paged.pages) // paged.part_pages
        return paged.words.new_empty(count, self._num_blocks + 1, LANES)

    def _sum(self, paged: _Paged, sums: torch.Tensor, first: int, number: int) -> None:
        """Blocks [first, first + number) of each page."""
        total = paged.part_pages * number
        _sum_blocks[(len(sums), triton.cdiv(total, BLOCKS_A_PROGRAM))](
            paged.words,
            paged.pages,
            self._keys,
            sums,
            paged.part_pages,
            paged.page_words,
            paged.words.stride(0),
            self._num_blocks,
            self._last_stripes,
            first,
            number,
            BLOCKS=BLOCKS_A_PROGRAM,
            num_warps=8,
        )

    def _chain_sums(self, paged: _Paged, sums: torch.Tensor) -> torch.Tensor:
        found = paged.words.new_empty(len(sums), LANES)
        _chain_blocks[(len(sums),)](
            paged.words,
            paged.pages,
            sums,
            self._start,
            self._scramble,
            self._last,
            found,
            paged.part_pages,
            paged.page_words,
            paged.words.stride(0),
            self._num_blocks,
            PRIME=_P32_1,
            STEP=UNROLL,
            num_warps=1,
        )
        return found

    def _sums(self, words: torch.Tensor) -> torch.Tensor:
        count = len(words)
        there = (self._num_blocks * BLOCK_STRIPES + self._last_stripes) * LANES
        padded = words.new_zeros(count, (self._num_blocks + 1) * BLOCK_STRIPES * LANES)
        used = _mixed(words[:, :there].view(count, -1, LANES), self._stripe_keys(there))
        padded[:, :there] = used.view(count, there)
        return padded.view(count, self._num_blocks + 1, BLOCK_STRIPES, LANES).sum(dim=2)

    def _stripe_keys(self, num_words: int) -> torch.Tensor:
        repeats = -(-num_words // len(self._keys))
        return self._keys.repeat(repeats)[:num_words].view(-1, LANES)

    def _chain(self, words: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        found = self._start.repeat(len(words), 1)
        for block in range(self._num_blocks):
            found = found + sums[:, block]
            found = (found ^ ((found >> 47) & 0x1FFFF) ^ self._scramble) * _P32_1
        return found + sums[:, self._num_blocks] + _mixed(words[:, -LANES:], self._last)


class _Paged(NamedTuple):
    """Where the words of parts lie: int64 [num_pages, page_words] with contiguous rows."""

    words: torch.Tensor
    pages: torch.Tensor
    part_pages: int
    page_words: int


class PagedSums(NamedTuple):
    """Parts whose blocks are being summed. `sums`: int64 [n, blocks, 8]; None without kernels, which sum at
    the end."""

    region: torch.Tensor
    paged: _Paged
    sums: torch.Tensor | None


def supports_pages(piece_bytes: int) -> bool:
    """Whether each KiB of a part lies in one such piece of a page, and so in one page."""
    return piece_bytes % BLOCK_BYTES == 0


def supports(part_bytes: int) -> bool:
    """Whole stripes, and long enough: every KV part that engines have."""
    return part_bytes > SHORT_BYTES and part_bytes % STRIPE_BYTES == 0


def _mixed(words: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What stripes [..., 8] add to the accumulators."""
    keyed = words ^ keys
    swapped = words[..., [lane ^ 1 for lane in range(LANES)]]
    return (keyed & _LOW32) * ((keyed >> 32) & _LOW32) + swapped


def _key(offset: int) -> Words:
    return np.frombuffer(_SECRET[offset : offset + STRIPE_BYTES], "<u8")


def _to_device(words: Words, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint64).view(np.int64)).to(device)


def _multiply_fold(a: Words, b: Words) -> Words:
    """The two halves of the 128-bit product, xored."""
    half, low = np.uint64(32), np.uint64(_LOW32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    lows, cross = a_low * b_low, a_high * b_low
    middle = (lows >> half) + (cross & low) + a_low * b_high
    upper = (cross >> half) + (middle >> half) + a_high * b_high
    lower = np.bitwise_or(middle << half, lows & low)
    result: Words = np.bitwise_xor(upper, lower)
    return result


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore] # triton is untyped
    def _sum_blocks(  # type: ignore[no-untyped-def] # noqa: PLR0913 - triton evaluates annotations
        words,
        pages,
        keys,
        sums,
        part_pages,
        page_words,
        stride_words,
        num_blocks,
        last_stripes,
        first_of_page,
        num_of_page,
        BLOCKS: tl.constexpr,
    ):
        """Program (i, j) sums BLOCKS of part i's blocks, of which `num_of_page` from `first_of_page` on count
        in each page; the part's last has fewer stripes."""
        low = tl.full((), 0xFFFFFFFF, tl.int64)
        part = tl.program_id(0).to(tl.int64)
        number = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        block = number // num_of_page * (page_words // 128) + first_of_page + number % num_of_page
        block = tl.where(number < part_pages * num_of_page, block, num_blocks + 1)
        stripe, lane = tl.arange(0, 16), tl.arange(0, 8)
        count = tl.where(block < num_blocks, 16, tl.where(block == num_blocks, last_stripes, 0))
        there = (stripe[None, :, None] < count[:, None, None]) & (lane[None, None, :] >= 0)
        inside = stripe[:, None] * 8 + lane[None, :]
        begin = block.to(tl.int64) * 128
        nth = tl.minimum(begin // page_words, part_pages - 1)
        page = tl.load(pages + part * part_pages + nth)
        first = page * stride_words + (begin - nth * page_words)
        word = first[:, None, None] + inside[None, :, :]
        other = first[:, None, None] + (inside ^ 1)[None, :, :]
        data = tl.load(words + word, mask=there, other=0)
        swapped = tl.load(words + other, mask=there, other=0)
        keyed = data ^ tl.load(keys + inside)[None, :, :]
        product = (keyed & low) * ((keyed >> 32) & low)
        added = tl.sum(tl.where(there, product + swapped, 0), axis=1)
        row = part * (num_blocks + 1) + block
        target = sums + row[:, None] * 8 + lane[None, :]
        tl.store(target, added, mask=(block <= num_blocks)[:, None] & (lane >= 0)[None, :])

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore] # triton is untyped
    def _chain_blocks(  # type: ignore[no-untyped-def] # noqa: PLR0913 - triton evaluates annotations
        words,
        pages,
        sums,
        start,
        scramble,
        last,
        found,
        part_pages,
        page_words,
        stride_words,
        num_blocks,
        PRIME: tl.constexpr,
        STEP: tl.constexpr,
    ):
        """Program i chains the blocks of part i, and adds the last block and the last stripe."""
        low, prime = tl.full((), 0xFFFFFFFF, tl.int64), tl.full((), PRIME, tl.int64)
        part = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, 8)
        key = tl.load(scramble + lane)
        row = sums + part * (num_blocks + 1) * 8 + lane
        state = tl.load(start + lane)
        whole = num_blocks // STEP * STEP
        for block in range(0, whole, STEP):
            for step in tl.static_range(STEP):
                state += tl.load(row + (block + step) * 8)
                state = (state ^ ((state >> 47) & 0x1FFFF) ^ key) * prime
        for block in range(whole, num_blocks):
            state += tl.load(row + block * 8)
            state = (state ^ ((state >> 47) & 0x1FFFF) ^ key) * prime
        page = tl.load(pages + (part + 1) * part_pages - 1)
        end = words + page * stride_words + page_words - 8
        keyed = tl.load(end + lane) ^ tl.load(last + lane)
        state += (keyed & low) * ((keyed >> 32) & low) + tl.load(end + (lane ^ 1))
        state += tl.load(row + num_blocks * 8)
        tl.store(found + part * 8 + lane, state)
