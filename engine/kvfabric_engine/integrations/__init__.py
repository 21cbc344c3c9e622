"""Connectors for engines that are not ours. Each module may import its engine; nothing else imports them."""
