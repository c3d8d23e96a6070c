//! Ids that a person can read out and type: base 32 without the letters that look like digits.

/// Digits (Crockford's base 32, lower case).
const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Digits of a random id: 40 bits.
const RANDOM_DIGITS: u32 = 8;
/// Digits of a counted id: 35 bits.
const COUNTED_DIGITS: u32 = 7;

/// A random id. Without randomness, which no supported system lacks, it is all zeros and is refused
/// as taken where it is.
pub(super) fn random() -> String {
    text(getrandom::u64().unwrap_or(0), RANDOM_DIGITS)
}

/// The id of the `n`th request of a controlplane whose numbers begin anywhere. No two are the same, and
/// as the multiples of the golden ratio lie as far from each other as so many numbers can (Knuth, The
/// Art of Computer Programming 3, §6.4), some hundred thousand in a row differ in their first four
/// digits, which are all that a person need type.
pub(super) fn spread(n: u64) -> String {
    // 2^40 divided by the golden ratio; odd, so that the map is one to one in 40 bits.
    text(n.wrapping_mul(0x009E_3779_B97F), RANDOM_DIGITS)
}

/// The id of the `n`th thing: neighbours differ in every digit, so that a short prefix is enough.
pub(super) fn counted(n: u64) -> String {
    // Odd, so that the map is one to one in 35 bits.
    text(n.wrapping_mul(0x0005_DEEC_E66D), COUNTED_DIGITS)
}

fn text(bits: u64, digits: u32) -> String {
    // The lowest bits of a product are the poorest, so they come last.
    (0..digits)
        .rev()
        .map(|i| char::from(DIGITS[(bits >> (5 * i)) as usize & 31]))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn counted_ids_are_unique_and_random_ones_short() {
        let ids: HashSet<String> = (0..100_000).map(counted).collect();
        assert_eq!(ids.len(), 100_000);
        assert!(ids.iter().all(|id| id.len() == 7));
        assert_eq!(random().len(), 8);
        assert_ne!(random(), random());
    }

    #[test]
    fn requests_of_a_day_differ_in_the_four_digits_that_are_typed() {
        for start in [0, 1 << 33, u64::MAX - 5] {
            let ids: HashSet<String> = (0..200_000).map(|n: u64| spread(start.wrapping_add(n))).collect();
            let typed: HashSet<&str> = ids.iter().map(|id| &id[..4]).collect();
            assert_eq!((ids.len(), typed.len()), (200_000, 200_000));
        }
    }
}
