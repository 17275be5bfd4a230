from hf_vlmerge.evaluation.tables import markdown


def test_columns_have_one_width():
    assert markdown(["arm", "recall"], [["seeded merge", "75.2"], ["naive", "9"]]) == [
        "| arm          | recall |",
        "|--------------|--------|",
        "| seeded merge | 75.2   |",
        "| naive        | 9      |",
    ]
