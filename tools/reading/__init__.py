"""Files that other people made: training sets, real images, manifests. Nothing in them is trusted."""
