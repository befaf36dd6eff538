"""The hostile cases, one module for each kind; `kvmpy.conformance.cases.table` numbers them."""
