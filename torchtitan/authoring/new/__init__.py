"""`torchtitan new`: a folder to start a model from, which trains and verifies at once.

* `source.py`: copies a model of the zoo under another name;
* `hugging_face.py`: flavor and table of names from a Hugging Face folder;
* `templates.py`: the files around the model;
* `command.py`: the command line, and what is written where.
"""
