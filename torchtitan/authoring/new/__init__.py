"""`torchtitan new`: a folder to start a model from, which trains and verifies at once.

* `source.py`: copies a model of the zoo under another name;
* `hugging_face.py`: finds flavor and table of names in a Hugging Face folder;
* `templates.py`: the files around the model;
* `command.py`: the command line, and the writing of files.
"""
