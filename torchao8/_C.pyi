"""The compiled extension: importing it registers the ops under torch.ops.torchao8."""
