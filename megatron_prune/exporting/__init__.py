"""What other software opens: Hugging Face directories, ibm-fms, MaxText."""
