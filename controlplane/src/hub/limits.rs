//! Limits that a guest met in its dataplane: of what the dataplane counts, what is worth an event.
//!
//! The counts come with the VM's status, once a second at most. One that grew is told as a limit that was
//! reached: at once the first time, then in one event a minute (`repeats`), with how many were refused.

use std::collections::BTreeMap;

use vnet_proto::v1;

use super::State;
use super::events::about;
use super::repeats::Key;
use crate::clock::Now;

/// A count of the dataplane's (docs/life-of-a-packet.md), and what it says.
const LIMITS: &[(&str, &str)] = &[
    ("flow_limit", "a limit of flows is reached; new ones are refused"),
    (
        "held_limit",
        "a limit of what may wait for an answer is reached; more is refused",
    ),
    ("address_limit", "the limit of addresses of one guest is reached"),
    (
        "descriptors_refused",
        "the host's descriptors are few and the guest has its share; new flows are refused",
    ),
    (
        "flows_made_way",
        "the guest has more than its share of the host's descriptors; idle flows made way for others",
    ),
    (
        "ring_growth_refused",
        "the limit of buffer memory is reached; connections are slower",
    ),
    (
        "dns_held_limit",
        "the limit of lookups that may wait for an answer is reached; more are refused",
    ),
    (
        "dns_upstream_limit",
        "the limit of open lookups is reached; more are refused",
    ),
    (
        "dns_alias_limit",
        "the limit of aliases in answers, or of answers that wait for them, is reached; more are refused",
    ),
    (
        "synthetic_exhausted",
        "every synthetic address is in use; lookups are refused",
    ),
    (
        "dns_connection_limit",
        "the limit of connections to the gateway's DNS is reached; more are refused",
    ),
];

/// What grew from one set of counts to the next, by how much. Counts that are lower than they were began
/// anew.
pub(super) fn reached<'a>(
    before: [&'a BTreeMap<String, u64>; 2],
    after: [&'a BTreeMap<String, u64>; 2],
) -> Vec<(&'static str, u64)> {
    let count = |maps: [&BTreeMap<String, u64>; 2], name: &str| {
        maps.iter().filter_map(|counts| counts.get(name)).sum::<u64>()
    };
    LIMITS
        .iter()
        .filter_map(|(name, text)| {
            let (before, after) = (count(before, name), count(after, name));
            let grown = after.checked_sub(before).unwrap_or(after);
            (grown > 0).then_some((*text, grown))
        })
        .collect()
}

impl State {
    /// Tells that a VM has met limits.
    pub(super) fn limits_reached(&mut self, now: Now, name: &str, reached: Vec<(&'static str, u64)>) {
        for (text, count) in reached {
            self.metrics.limits_reached.add(count);
            let event = about(v1::EventKind::LimitReached, name, format!("{name}: {text}"));
            self.repeated_event(now, Key::limit(text), count, event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
        pairs.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect()
    }

    #[test]
    fn the_counts_are_those_that_the_dataplane_has() {
        let page = include_str!("../../../docs/life-of-a-packet.md");
        for (name, _) in LIMITS {
            assert!(page.contains(&format!("`{name}`")), "{name}");
        }
        let words = page.split(|c: char| !c.is_ascii_lowercase() && c != '_');
        let is_limit = |word: &&str| word.starts_with("dns_") && word.ends_with("_limit");
        for word in words.filter(|word| is_limit(word) || *word == "synthetic_exhausted") {
            assert!(
                LIMITS.iter().any(|(name, _)| *name == word),
                "nobody is told of {word}"
            );
        }
    }

    #[test]
    fn what_grew_is_told_with_its_growth_and_nothing_else() {
        let none = BTreeMap::new();
        let dropped = counts(&[("flow_limit", 3), ("denied", 9)]);
        let counters = counts(&[("dns_held_limit", 1), ("dns_relayed", 5)]);
        let first = reached([&none, &none], [&dropped, &counters]);
        assert_eq!(first.iter().map(|(_, n)| *n).collect::<Vec<_>>(), [3, 1]);
        assert!(reached([&dropped, &counters], [&dropped, &counters]).is_empty());
        let more = counts(&[("flow_limit", 10)]);
        assert_eq!(reached([&dropped, &counters], [&more, &counters])[0].1, 7);
        let anew = counts(&[("flow_limit", 2)]);
        assert_eq!(
            reached([&more, &none], [&anew, &none])[0].1,
            2,
            "a dataplane that began anew"
        );
    }
}
