"""The rooms of the PEFT dialect; its door is adapterhub_tools/dialects/peft.py."""
