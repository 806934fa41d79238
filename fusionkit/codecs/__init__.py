"""The built-in codecs, registered through entry points like anyone's."""
