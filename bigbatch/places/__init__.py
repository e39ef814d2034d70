"""Where files lie and how they are written: on this machine or in a bucket, whole or not at all."""
