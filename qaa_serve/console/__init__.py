"""`qaa-serve console`: a web page to try, watch and change what a server serves, by a process of its own."""
