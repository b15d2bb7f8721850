"""One model on several devices (tensor parallelism): what its ranks say to each other, and who watches them."""
