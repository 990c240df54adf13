"""Search for images by captions of any length, and for captions by images: index, service, web page."""
