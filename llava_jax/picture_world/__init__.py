"""A small world of drawn pictures, of which everything is known: a data set like any other.

`python -m llava_jax.picture_world --out DIR` writes, with names that stay:

    {split}/000000000001.png, …002.jpg, …   pictures; splits: train, dev, test, unseen_pairs
    annotations/captions_{split}.json       COCO's layout, five captions a picture
    annotations/instances_{split}.json      boxes [x, y, width, height], categories, colours
    llava_pretrain.json                     stage 1, from train: every picture with every caption;
                                            ids end in 1 to 5, and 1 names all there is
    llava_pretrain_{split}.json             the same of dev, test, unseen_pairs, for their loss
    llava_instruct.json                     stage 2, from train: ids end in -conversation, -detail
                                            or -reasoning
    llava_instruct_{split}.json             the same of dev, test, unseen_pairs, for their loss
    llava_compare.json                      two pictures (-comparison), or three (-summary)
    closed_{split}.jsonl                    of dev, test, unseen_pairs: question_id, image, text,
                                            answer, category, two_way
    compare_{split}.jsonl                   the same about two pictures: "image" is a list
    pairs/{split}/000000000001_1.png, …_2.png   the pictures to compare
    science_qa/problems.json, pid_splits.json, images/{train,val,test}/{pid}/image.png

Images are named relative to DIR, in COCO's files relative to the split's folder. dev and test have
arrangements that train has not; unseen_pairs has colour-shape pairs that no other picture or text
has. two_way marks questions with two possible answers, where a blind guess is right half the time.
Texts are lower case; only signs are read in capitals.

In Python: scenes.scene(seed, split, index), drawing.draw(scene, size), writing.write(folder, …).
"""
