from torchtitan.config.toml_file import line_numbers

DOCUMENT = '''\
# a comment with [brackets] and = signs
top = 1

[a]          # header
"quoted key" = 1
b.c = 2
text = """
[not.a.header]
not_a_key = 5
"""
literal = \'\'\'
x = 1\'\'\'
after = { x = 1, y = { z = [1, 2] } }
array = [
  1, # one

  2,
]
last = 3
[d.e]
x = 1
[[t]]
x = 1
[[t.u]]
y = 1
[[t.u]]
y = 2
[t.v]
z = 1
[[t]]
x = 2
[["t".u]]
y = 3
'''


def test_lines_of_tables_and_keys():
    lines = line_numbers(DOCUMENT)
    expected = {
        ("top",): 2,
        ("a",): 4,
        ("a", "quoted key"): 5,
        ("a", "b"): 6,
        ("a", "b", "c"): 6,
        ("a", "text"): 7,
        ("a", "literal"): 11,
        ("a", "after"): 13,
        ("a", "after", "y", "z", 1): 13,
        ("a", "array"): 14,
        ("a", "array", 1): 14,  # the line where the array begins
        ("a", "last"): 19,
        ("d",): 20,
        ("d", "e"): 20,
        ("d", "e", "x"): 21,
        ("t", 0): 22,
        ("t", 0, "x"): 23,
        ("t", 0, "u", 0): 24,
        ("t", 0, "u", 0, "y"): 25,
        ("t", 0, "u", 1): 26,
        ("t", 0, "u", 1, "y"): 27,
        ("t", 0, "v", "z"): 29,
        ("t", 1): 30,
        ("t", 1, "x"): 31,
        ("t", 1, "u", 0, "y"): 33,
    }
    assert {path: lines[path] for path in expected} == expected
    assert not any("not_a_key" in path or "not" in path for path in lines)


def test_hundreds_of_levels_are_no_problem():
    key = ".".join(["a"] * 900)  # Python 3.14 allows 1,000
    lines = line_numbers(f"x = 1\n{key} = 1\n[b.{key}]\n{key} = 2\n")
    assert lines[("a",) * 5] == 2
    assert lines["b", "a", "a"] == 3
