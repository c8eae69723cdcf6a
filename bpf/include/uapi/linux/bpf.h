/* BCC includes this name and needs nothing from it: it brings its own copy of what it uses. */
