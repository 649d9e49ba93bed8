"""The picture that image to image begins with: from a data URI or an https URL to pixels."""
