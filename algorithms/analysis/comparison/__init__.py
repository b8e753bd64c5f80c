"""What several runs say together: tables, tests, curves and pages out of run directories."""
