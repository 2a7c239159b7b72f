"""`python -m llm_dqn` is `llm-dqn`."""

from llm_dqn.cli import main

if __name__ == "__main__":
    main()
