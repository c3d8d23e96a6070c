//! Sets of name patterns: whether one covers a name, and how far around a name the same answer holds.
//!
//! Both questions cost as many hash lookups as the name has labels, however large the set.

use std::collections::HashSet;

use vnet_proto::model::{LookupMatch, Name, NamePattern};

/// Name patterns, in no order.
#[derive(Debug, Clone, Default)]
pub struct NameSet {
    exact: HashSet<Box<str>>,
    /// The `x` of each `*.x`.
    below: HashSet<Box<str>>,
    /// Every proper ancestor of a name in `exact` or `below`: names under it do not all fare alike.
    mixed: HashSet<Box<str>>,
}

impl NameSet {
    /// Whether it has no pattern.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.below.is_empty()
    }

    /// How many patterns it has.
    pub fn len(&self) -> usize {
        self.exact.len() + self.below.len()
    }

    /// All patterns, in no order.
    pub fn patterns(&self) -> impl Iterator<Item = NamePattern> + '_ {
        let read = |text: &str| Name::from_canonical(text).ok();
        let exact = self
            .exact
            .iter()
            .filter_map(move |n| read(n).map(NamePattern::Exact));
        exact.chain(
            self.below
                .iter()
                .filter_map(move |n| read(n).map(NamePattern::Subdomains)),
        )
    }

    /// The pattern that covers a name; of several, an exact one, else the longest.
    pub fn covering(&self, name: &Name) -> Option<NamePattern> {
        if self.exact.contains(name.as_str()) {
            return Some(NamePattern::Exact(name.clone()));
        }
        let parent = name
            .ancestors()
            .skip(1)
            .find(|parent| self.below.contains(*parent))?;
        Name::from_canonical(parent).ok().map(NamePattern::Subdomains)
    }

    /// Whether a pattern covers a name.
    pub fn contains(&self, name: &Name) -> bool {
        self.exact.contains(name.as_str())
            || self.below.len() != 0 && name.ancestors().skip(1).any(|parent| self.below.contains(parent))
    }

    /// Whether it covers every name that `pattern` does, by one pattern of its own.
    pub fn covers(&self, pattern: &NamePattern) -> bool {
        match pattern {
            NamePattern::Exact(name) => self.contains(name),
            NamePattern::Subdomains(parent) => {
                parent.ancestors().any(|ancestor| self.below.contains(ancestor))
            }
        }
    }

    /// The widest region around `name`, no wider than `within`, in which the answer of
    /// [`NameSet::contains`] is the one for `name`.
    pub(crate) fn narrow(&self, within: LookupMatch, name: &Name) -> LookupMatch {
        if self.is_empty() {
            return within;
        }
        match self.covering(name) {
            Some(NamePattern::Exact(_)) => LookupMatch::Exact(name.clone()),
            // The shortest covering parent would do as well; the longest is correct and at hand.
            Some(NamePattern::Subdomains(parent)) => narrower(within, LookupMatch::Subdomains(parent)),
            None => {
                let ancestors: Vec<&str> = name.ancestors().skip(1).collect();
                let clear = ancestors.iter().rev().find(|a| !self.mixed.contains(**a));
                match clear.and_then(|a| Name::from_canonical(a).ok()) {
                    Some(parent) => narrower(within, LookupMatch::Subdomains(parent)),
                    None => LookupMatch::Exact(name.clone()),
                }
            }
        }
    }
}

/// The narrower of two regions that both contain one name, and of which one therefore contains the other.
fn narrower(a: LookupMatch, b: LookupMatch) -> LookupMatch {
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
        let mut set = Self::default();
        for pattern in patterns {
            for ancestor in pattern.name().ancestors().skip(1) {
                set.mixed.insert(ancestor.into());
            }
            match pattern {
                NamePattern::Exact(name) => set.exact.insert(name.as_str().into()),
                NamePattern::Subdomains(parent) => set.below.insert(parent.as_str().into()),
            };
        }
        set
    }
}
