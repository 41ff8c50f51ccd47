// Package config turns a TOML file and the flags of "conenatd run" into one
// checked Config.
//
// Every error says where the value stands (file and line, or flag), which key
// it is and what was expected; all errors of a file and a command line come
// back together. A key that nobody knows is an error too.
//
// The package reads the one file it is given and nothing else. It never asks
// the kernel: whether a link exists or a subnet is the outside link's own is
// the daemon's question.
package config
