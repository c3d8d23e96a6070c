//! Sets of name patterns: whether one covers a name, and how far around a name the same answer holds.
//!
//! Both questions cost a few hash lookups for each label of the name, however large the set. A set is
//! made of tables; those of named lists are shared by everything that refers to them. A table keeps all
//! of its names in one arena, and a name's ancestors are slices of it: a million names cost about as
//! many bytes as they have characters, and 9 to 36 bytes each beside.

use std::sync::Arc;

use ahash::RandomState;
use hashbrown::HashTable;
use vnet_proto::model::{LookupMatch, Name, NamePattern};

use crate::policy::patterns::NamePatterns;

/// It is a pattern by itself.
const EXACT: u8 = 1;
/// It is the `x` of a pattern `*.x`.
const BELOW: u8 = 2;
/// It is a proper ancestor of a pattern's name: names under it do not all fare alike.
const MIXED: u8 = 4;

/// One table of name patterns, in no order.
#[derive(Debug, Clone, Default)]
pub struct NameTable {
    arena: String,
    entries: HashTable<Entry>,
    hasher: RandomState,
    patterns: usize,
}

/// A slice of the arena, and what it is.
#[derive(Debug, Clone, Copy)]
struct Entry {
    offset: u32,
    length: u16,
    flags: u8,
}

impl Entry {
    fn text(self, arena: &str) -> &str {
        let start = self.offset as usize;
        arena.get(start..start + usize::from(self.length)).unwrap_or("")
    }
}

impl NameTable {
    /// Adds a pattern. False if the table is full, at 4 GiB of names.
    pub fn insert(&mut self, pattern: &NamePattern) -> bool {
        let text = pattern.name().as_str();
        let flag = match pattern {
            NamePattern::Exact(_) => EXACT,
            NamePattern::Subdomains(_) => BELOW,
        };
        let Ok(end) = u32::try_from(self.arena.len() + text.len()) else {
            return false;
        };
        let next = end - length(text);
        let (offset, before) = self.mark(text, next, flag);
        if offset == next {
            // It is new, and its ancestors may point into it from here on.
            self.arena.push_str(text);
        }
        self.patterns += usize::from(before & flag == 0);
        for ancestor in pattern.name().ancestors().skip(1) {
            let at = offset + length(text) - length(ancestor);
            // Then all above it are marked as well.
            if self.mark(ancestor, at, MIXED).1 & MIXED != 0 {
                break;
            }
        }
        true
    }

    /// Sets a flag of a text, which is put at `offset` if it is new. Gives where it stands, and its
    /// flags before.
    fn mark(&mut self, text: &str, offset: u32, flag: u8) -> (u32, u8) {
        let hash = self.hasher.hash_one(text);
        let arena = &self.arena;
        if let Some(entry) = self.entries.find_mut(hash, |entry| entry.text(arena) == text) {
            let before = entry.flags;
            entry.flags |= flag;
            return (entry.offset, before);
        }
        let entry = Entry {
            offset,
            length: u16::try_from(text.len()).unwrap_or(u16::MAX),
            flags: flag,
        };
        let hasher = &self.hasher;
        self.entries
            .insert_unique(hash, entry, |entry| hasher.hash_one(entry.text(arena)));
        (offset, 0)
    }

    fn flags(&self, text: &str) -> u8 {
        let hash = self.hasher.hash_one(text);
        self.entries
            .find(hash, |entry| entry.text(&self.arena) == text)
            .map_or(0, |entry| entry.flags)
    }

    /// How many patterns it has.
    pub fn len(&self) -> usize {
        self.patterns
    }

    /// Whether it has no pattern.
    pub fn is_empty(&self) -> bool {
        self.patterns == 0
    }

    /// Bytes that it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        // Hashbrown keeps a byte beside each slot, and slots for 8/7 of its capacity.
        self.arena.capacity() + self.entries.capacity() * 8 / 7 * (size_of::<Entry>() + 1)
    }

    /// Gives back what it holds in reserve.
    #[must_use]
    pub fn shrunk(mut self) -> Self {
        self.arena.shrink_to_fit();
        let (arena, hasher) = (&self.arena, &self.hasher);
        self.entries
            .shrink_to_fit(|entry| hasher.hash_one(entry.text(arena)));
        self
    }

    /// All patterns, in no order.
    pub fn patterns(&self) -> impl Iterator<Item = NamePattern> + '_ {
        self.entries.iter().flat_map(|entry| {
            let name = Name::from_canonical(entry.text(&self.arena)).ok();
            let exact = name.clone().filter(|_| entry.flags & EXACT != 0);
            let below = name.filter(|_| entry.flags & BELOW != 0);
            let exact = exact.map(NamePattern::Exact);
            exact.into_iter().chain(below.map(NamePattern::Subdomains))
        })
    }

    /// Whether a pattern covers a name.
    pub fn contains(&self, name: &Name) -> bool {
        self.flags(name.as_str()) & EXACT != 0
            || name
                .ancestors()
                .skip(1)
                .any(|parent| self.flags(parent) & BELOW != 0)
    }

    /// The widest pattern that covers a name.
    fn covering(&self, name: &Name) -> Option<NamePattern> {
        let below = name
            .ancestors()
            .skip(1)
            .filter(|parent| self.flags(parent) & BELOW != 0)
            .last();
        match below.and_then(|parent| Name::from_canonical(parent).ok()) {
            Some(parent) => Some(NamePattern::Subdomains(parent)),
            None => (self.flags(name.as_str()) & EXACT != 0).then(|| NamePattern::Exact(name.clone())),
        }
    }

    /// Whether names below `ancestor` may fare differently.
    pub(crate) fn is_mixed(&self, ancestor: &str) -> bool {
        self.flags(ancestor) & MIXED != 0
    }
}

impl<'a> Extend<&'a NamePattern> for NameTable {
    fn extend<I: IntoIterator<Item = &'a NamePattern>>(&mut self, patterns: I) {
        for pattern in patterns {
            self.insert(pattern);
        }
    }
}

fn length(text: &str) -> u32 {
    // A name has at most 1,012 bytes, escapes included.
    u32::try_from(text.len()).unwrap_or(u32::MAX)
}

/// Name patterns, in no order: tables, each perhaps shared with others.
#[derive(Debug, Clone, Default)]
pub struct NameSet {
    tables: Vec<Arc<NameTable>>,
    /// Regular expressions beside them.
    expressions: Option<Arc<NamePatterns>>,
}

impl NameSet {
    /// Adds all patterns of a table.
    pub fn share(&mut self, table: Arc<NameTable>) {
        let there = self.tables.iter().any(|other| Arc::ptr_eq(other, &table));
        if !there && !table.is_empty() {
            self.tables.push(table);
        }
    }

    /// Those that regular expressions match, and no others.
    pub fn of_expressions(expressions: Arc<NamePatterns>) -> Self {
        Self {
            tables: Vec::new(),
            expressions: Some(expressions),
        }
    }

    /// Its regular expressions, if it has any.
    pub fn expressions(&self) -> Option<&Arc<NamePatterns>> {
        self.expressions.as_ref()
    }

    /// Whether a name is one of its patterns by itself, and not only below one.
    pub fn has_exact(&self, name: &Name) -> bool {
        self.tables
            .iter()
            .any(|table| table.flags(name.as_str()) & EXACT != 0)
    }

    /// The tables that it is made of; none is empty.
    pub fn tables(&self) -> &[Arc<NameTable>] {
        &self.tables
    }

    /// Whether it has no pattern.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.expressions.is_none()
    }

    /// How many patterns it has; one that stands in two of its lists counts twice, expressions do not count.
    pub fn len(&self) -> usize {
        self.tables.iter().map(|table| table.len()).sum()
    }

    /// All patterns but regular expressions, in no order.
    pub fn patterns(&self) -> impl Iterator<Item = NamePattern> + '_ {
        self.tables.iter().flat_map(|table| table.patterns())
    }

    /// The widest pattern that covers a name.
    pub fn covering(&self, name: &Name) -> Option<NamePattern> {
        let found = self.tables.iter().filter_map(|table| table.covering(name));
        let found = found.min_by_key(|pattern| match pattern {
            NamePattern::Subdomains(parent) => (0, parent.as_str().len()),
            NamePattern::Exact(_) => (1, 0),
        });
        // How far around a name an expression matches, nobody can tell.
        found.or_else(|| self.matches(name).then(|| NamePattern::Exact(name.clone())))
    }

    /// Whether a pattern covers a name.
    pub fn contains(&self, name: &Name) -> bool {
        self.tables.iter().any(|table| table.contains(name)) || self.matches(name)
    }

    fn matches(&self, name: &Name) -> bool {
        self.expressions
            .as_ref()
            .is_some_and(|expressions| expressions.contains(name))
    }

    /// Whether it covers every name that `pattern` does, by one pattern of its own.
    pub fn covers(&self, pattern: &NamePattern) -> bool {
        match pattern {
            NamePattern::Exact(name) => self.contains(name),
            NamePattern::Subdomains(parent) => parent
                .ancestors()
                .any(|ancestor| self.tables.iter().any(|t| t.flags(ancestor) & BELOW != 0)),
        }
    }

    /// Whether names below `ancestor` may fare differently.
    pub(crate) fn is_mixed(&self, ancestor: &str) -> bool {
        self.expressions.is_some() || self.tables.iter().any(|table| table.is_mixed(ancestor))
    }

    /// The widest region around `name`, no wider than `within`, in which the answer of
    /// [`NameSet::contains`] is the one for `name`.
    pub(crate) fn narrow(&self, within: LookupMatch, name: &Name) -> LookupMatch {
        if self.is_empty() {
            return within;
        }
        match self.covering(name) {
            Some(NamePattern::Exact(_)) => LookupMatch::Exact(name.clone()),
            Some(NamePattern::Subdomains(parent)) => narrower(within, LookupMatch::Subdomains(parent)),
            None => narrower(within, clear_around(name, |ancestor| self.is_mixed(ancestor))),
        }
    }
}

/// The widest region around `name` in which nothing that is `mixed` lies. What is above a mixed name is
/// mixed as well.
pub(crate) fn clear_around(name: &Name, mixed: impl Fn(&str) -> bool) -> LookupMatch {
    let clear = name.ancestors().skip(1).take_while(|ancestor| !mixed(ancestor));
    match clear
        .last()
        .and_then(|ancestor| Name::from_canonical(ancestor).ok())
    {
        Some(parent) => LookupMatch::Subdomains(parent),
        None => LookupMatch::Exact(name.clone()),
    }
}

/// The narrower of two regions that both contain one name, and of which one therefore contains the other.
pub(crate) fn narrower(a: LookupMatch, b: LookupMatch) -> LookupMatch {
    match (&a, &b) {
        (LookupMatch::Any, _) | (_, LookupMatch::Exact(_)) => b,
        (_, LookupMatch::Any) | (LookupMatch::Exact(_), _) => a,
        (LookupMatch::Subdomains(x), LookupMatch::Subdomains(y)) => {
            if y.as_str().len() > x.as_str().len() {
                b
            } else {
                a
            }
        }
    }
}

impl FromIterator<NamePattern> for NameSet {
    fn from_iter<I: IntoIterator<Item = NamePattern>>(patterns: I) -> Self {
        let mut table = NameTable::default();
        for pattern in patterns {
            table.insert(&pattern);
        }
        let mut set = Self::default();
        set.share(Arc::new(table.shrunk()));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> NamePattern {
        text.parse().unwrap()
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn a_table_holds_what_was_put_in_and_nothing_else() {
        let mut table = NameTable::default();
        for text in ["a.example.com", "*.example.com", "b.test", "x.b.test", "b.test"] {
            assert!(table.insert(&pattern(text)));
        }
        let mut found: Vec<String> = table.patterns().map(|p| p.to_string()).collect();
        found.sort();
        assert_eq!(found, ["*.example.com", "a.example.com", "b.test", "x.b.test"]);
        assert_eq!(table.len(), 4);
        let set = NameSet {
            tables: vec![Arc::new(table)],
            expressions: None,
        };
        for (text, there) in [
            ("a.example.com", true),
            ("q.example.com", true),
            ("example.com", false),
            ("b.test", true),
            ("y.b.test", false),
            ("test", false),
            ("evil-example.com", false),
            ("example.com.evil.test", false),
        ] {
            assert_eq!(set.contains(&name(text)), there, "{text}");
        }
    }

    #[test]
    fn a_name_that_first_came_as_an_ancestor_is_found_when_it_comes_itself() {
        let mut table = NameTable::default();
        table.extend(&[pattern("a.b.c.test"), pattern("c.test"), pattern("*.b.c.test")]);
        assert!(table.contains(&name("c.test")) && table.contains(&name("z.b.c.test")));
        assert!(!table.contains(&name("b.c.test")) && table.is_mixed("b.c.test"));
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn names_with_escapes_longer_than_255_bytes_are_kept_whole() {
        let label = [b'+'; 63];
        let long = Name::from_labels([&label[..], &label[..], b"test"].into_iter()).unwrap();
        assert!(long.as_str().len() > 255);
        let set = NameSet::from_iter([NamePattern::Exact(long.clone())]);
        assert!(set.contains(&long));
        assert!(!set.contains(&Name::from_labels([&label[1..], &label[..], b"test"].into_iter()).unwrap()));
    }

    #[test]
    fn a_region_around_a_name_is_as_wide_over_several_tables_as_over_one() {
        let mut parts = NameSet::from_iter([pattern("*.a.test")]);
        parts.share(Arc::clone(&NameSet::from_iter([pattern("x.b.test")]).tables()[0]));
        let whole = NameSet::from_iter([pattern("*.a.test"), pattern("x.b.test")]);
        for text in [
            "q.a.test", "a.test", "x.b.test", "y.b.test", "c.test", "q.c.test", "q.other",
        ] {
            let region = |set: &NameSet| set.narrow(LookupMatch::Any, &name(text));
            assert_eq!(region(&parts), region(&whole), "{text}");
        }
        assert_eq!(
            whole.narrow(LookupMatch::Any, &name("q.c.test")),
            LookupMatch::Subdomains(name("c.test"))
        );
    }

    #[test]
    fn a_hundred_thousand_names_take_little_more_than_their_characters() {
        let mut table = NameTable::default();
        let mut characters = 0;
        for number in 0..100_000 {
            let pattern = pattern(&format!("host{number}.site{number}.example"));
            characters += pattern.name().as_str().len();
            table.insert(&pattern);
        }
        let table = table.shrunk();
        assert_eq!(table.len(), 100_000);
        let beside = table.memory_bytes() - characters;
        assert!(beside < 100_000 * 36, "{beside} bytes beside the characters");
    }
}
