// Package deploy has no program: its tests check the files of this folder, with which
// conenatd is packaged and installed.
package deploy
