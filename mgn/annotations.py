"""Whether a value that gin binds fits the annotation of its parameter, and the error where it does not.

Annotated[int, 1, 4096] is an integer from 1 to 4096.
"""

import collections.abc
import math
import sys
import types
import typing

from gin.config import ConfigurableReference

from mgn.ops.arguments import shown
from mgn.ops.errors import UserError

WORDS = {bool: 'True or False', int: 'an integer', float: 'a finite number', types.NoneType: 'None',
         str: 'a string that is not empty'}
UNIONS = typing.Union, types.UnionType


def check(value, annotation, name):
    """UserError where the value of `name` does not fit."""
    if not fits(value, annotation):
        raise UserError(f'{name} must be {in_words(annotation)}, found {shown(value)}')


def check_all(values, configurable, where=''):
    """UserError where one of {parameter: value} does not fit or is no parameter's; `where` stands before its name."""
    expected = of_parameters(configurable)
    for name, value in values.items():
        if name not in expected:
            raise UserError(f'{where}{name} is unknown; another version of this project may know it')
        check(value, expected[name], f'{where}{name}')


def fits(value, annotation):
    """Whether a gin value (a literal, or a ConfigurableReference) may be bound to a parameter with this annotation.

    An integer of 64 bits fits where a number is asked for, and a list where a tuple is. True and False are no numbers,
    and '' is no string. A reference fits by the class that it refers to, or by what its function is annotated to
    return.
    """
    kind, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if kind in UNIONS:
        return any(fits(value, argument) for argument in arguments)
    if kind is typing.Annotated:
        plain, low, high = arguments
        return fits(value, plain) and low <= value <= high
    if isinstance(value, ConfigurableReference):
        if value.evaluate:
            return annotation not in WORDS and kind is None and makes(value, annotation)
        return kind is collections.abc.Callable and makes(value, arguments[-1])
    if kind is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if kind is tuple and isinstance(value, (tuple, list)):
        expected = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(expected) and all(map(fits, value, expected))
    if annotation is float:
        return type(value) in (int, float) and abs(value) <= (sys.maxsize if type(value) is int else sys.float_info.max)
    return type(value) is annotation and value != ''


def makes(reference, annotation):
    """Whether a call of what is referred to gives an instance of the class `annotation`, or of one in a union."""
    made = reference.configurable.wrapped
    if not isinstance(made, type):
        made = of_parameters(made).get('return')
    classes = typing.get_args(annotation) or (annotation,)
    if float in classes:
        classes += (int,)
    known = isinstance(made, type) and not typing.get_origin(made)  # a union, say, is not looked into
    return not reference.selector.startswith('gin.') and (not known or issubclass(made, classes))


def in_words(annotation):
    """What fits, e.g. 'an integer or None'."""
    kind, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if kind in UNIONS:
        return ' or '.join(dict.fromkeys(map(in_words, arguments)))
    if kind is typing.Annotated:
        plain, low, high = arguments
        return f'{in_words(plain)} from {low}{f" to {high}" if high < math.inf else ""}'
    if kind is typing.Literal:
        return ' or '.join(map(repr, arguments))
    if kind is tuple:
        each = [argument for argument in arguments if argument is not ...]
        of_any_length = "('name',)" if str in each else '(1, 2, 3)'
        example = of_any_length if arguments[-1] is ... else str(tuple(range(1, 1 + len(each))))
        return f'values in parentheses as in {example}, each {" or ".join(dict.fromkeys(map(in_words, each)))}'
    if kind is collections.abc.Callable:
        return 'a reference without parentheses such as @name'
    return WORDS.get(annotation, 'a reference with parentheses such as @name()')


def of_parameters(configurable):
    """{parameter: annotation}, and 'return', of a function or class; {} where annotations name what is not there."""
    try:
        made_by = configurable.__init__ if isinstance(configurable, type) else configurable
        return typing.get_type_hints(made_by, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}
