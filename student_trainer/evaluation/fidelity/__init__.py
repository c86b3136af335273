"""Every number that the paper and the reference code give about the method, beside ours."""
