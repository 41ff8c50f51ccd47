package nfnl

// Walk is walk, for the fuzz target.
var Walk = walk
