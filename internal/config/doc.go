// Package config turns a TOML file and the flags of "conenatd run" into one
// checked Config.
//
// Every error says where the value is (file, line and column, or flag), which key it has and what
// was expected. All errors of a file and a command line are returned together. An unknown
// key is an error, too.
//
// The package reads only the file that it is given. It never asks the kernel: whether a
// link exists, or whether a subnet belongs to the outside link, is for the daemon to find
// out.
package config
