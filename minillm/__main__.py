"""``python -m minillm``, and what ``deepspeed --module minillm`` starts on each rank."""

from minillm.cli import main

if __name__ == "__main__":
    main()
