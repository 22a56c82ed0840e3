"""From files to modules: folders, single files, hub ids, adapters; and the embedded model in `shapes/`."""
