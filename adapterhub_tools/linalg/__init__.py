"""The only shared maths: correctly rounded results, error-free sums, exact arithmetic at single points."""
