"""`rlaif view`: a run as pages in a browser, on loopback."""
