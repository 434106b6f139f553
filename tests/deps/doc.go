// Package deps holds what the compiler cannot check: which part of the tree may
// import which, that every exported name and package is documented, that files
// stay short, and that no package ends the process or waits by sleeping. It has
// nothing but tests, which read every Go file of the module.
package deps
