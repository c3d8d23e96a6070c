//! What a label of a VM may be, wherever it is set.

/// Characters of a key, and of a value, at most.
const CHARACTERS_MAX: usize = 63;

/// What is wrong with a label, as the end of a sentence that begins with it.
pub fn label_problem(key: &str, value: &str) -> Option<&'static str> {
    label_key_problem(key).or_else(|| {
        let fits = (1..=CHARACTERS_MAX).contains(&value.len()) && value.chars().all(is_character);
        (!fits).then_some("has a value that is not 1 to 63 of letters, digits, '.', '_' and '-'")
    })
}

/// What is wrong with a label's key alone.
pub fn label_key_problem(key: &str) -> Option<&'static str> {
    let fits = (1..=CHARACTERS_MAX).contains(&key.len())
        && key.starts_with(|c: char| c.is_ascii_alphanumeric())
        && key.chars().all(|c| is_character(c) || c == '/');
    (!fits).then_some("has a key that is not 1 to 63 of letters, digits, '.', '_', '-' and '/'")
}

fn is_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_are_words_that_need_no_quotes() {
        let long = "x".repeat(CHARACTERS_MAX + 1);
        assert_eq!(label_problem("team.example/role", "a_b-1"), None);
        assert_eq!(label_problem(&long[1..], &long[1..]), None);
        for key in ["", "a b", ".x", "/x", "a=b", "a,b", "\u{e9}", long.as_str()] {
            assert!(
                label_problem(key, "1").is_some_and(|why| why.contains("key")),
                "{key}"
            );
        }
        for value in ["", "a b", "a/b", "a,b", long.as_str()] {
            assert!(
                label_problem("k", value).is_some_and(|why| why.contains("value")),
                "{value}"
            );
        }
    }
}
