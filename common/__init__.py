"""What the teacher server and the student trainer share; imports neither of them, and no Ray."""
