"""What Burnish knows about each architecture, one file a family. Each is a plugin like any stranger's."""
