"""Other harnesses: our benchmarks as tasks of lmms-eval and as tables of VLMEvalKit, and what DEEM is asked there."""
