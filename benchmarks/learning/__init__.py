"""The learning benchmark: reward against scored completions, for llm_dqn and its peers on the same tasks and machine.

python -m benchmarks.learning --help
"""
