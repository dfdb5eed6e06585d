"""Where stages run. `local` is this machine."""
