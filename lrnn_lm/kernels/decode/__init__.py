"""One token through a layer of a recurrent model in four Triton kernels: what decoding runs on a GPU."""
