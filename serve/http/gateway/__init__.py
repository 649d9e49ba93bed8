"""The gateway: it makes a prompt tidy, calls the image app and passes its answer on."""
