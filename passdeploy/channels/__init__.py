"""Channel groups, their costs and the plan that says which channels stay: values, no network and no tracing."""
