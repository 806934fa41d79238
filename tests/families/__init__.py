"""Small families drawn at random, of every shape, spectrum and scale, that codecs are held to."""
