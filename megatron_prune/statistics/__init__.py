"""What scoring methods pull: passes over text, Hessians, moments, fits that correct what stays."""
