//! Sets of prefixes and of ports, in which looking costs little however large they are.
//!
//! Prefixes either nest or are apart, so that, sorted by address and then by length, those that hold an
//! address are the ancestors of its predecessor, and the nearest of the others stand beside it.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use vnet_proto::model::PortRange;

/// Prefixes in order, each with the nearest one around it.
#[derive(Debug, Clone, Default)]
pub struct PrefixTable {
    prefixes: Vec<IpNet>,
    /// The index of the nearest prefix around each; [`NONE`] for none.
    around: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl PrefixTable {
    /// All of them, in order.
    pub fn as_slice(&self) -> &[IpNet] {
        &self.prefixes
    }

    /// Those that hold an address, the longest first, with their indexes.
    pub fn holding(&self, address: IpAddr) -> impl Iterator<Item = (usize, IpNet)> + '_ {
        let mut next = self.after(address).checked_sub(1);
        std::iter::from_fn(move || {
            loop {
                let index = next?;
                let prefix = *self.prefixes.get(index)?;
                next = self
                    .around
                    .get(index)
                    .filter(|around| **around != NONE)
                    .map(|around| *around as usize);
                if prefix.contains(&address) {
                    return Some((index, prefix));
                }
            }
        })
    }

    /// Those before an address, nearest first, and those after it: between them, all.
    pub(crate) fn beside(
        &self,
        address: IpAddr,
    ) -> (
        impl Iterator<Item = (usize, IpNet)> + '_,
        impl Iterator<Item = (usize, IpNet)> + '_,
    ) {
        let after = self.after(address);
        let numbered = |index: usize| self.prefixes.get(index).map(|prefix| (index, *prefix));
        (
            (0..after).rev().filter_map(numbered),
            (after..self.prefixes.len()).filter_map(numbered),
        )
    }

    /// The index of the first that begins after an address.
    fn after(&self, address: IpAddr) -> usize {
        self.prefixes
            .partition_point(|prefix| prefix.network() <= address)
    }
}

impl FromIterator<IpNet> for PrefixTable {
    fn from_iter<I: IntoIterator<Item = IpNet>>(prefixes: I) -> Self {
        let mut prefixes: Vec<IpNet> = prefixes.into_iter().map(|net| net.trunc()).collect();
        prefixes.sort_unstable_by_key(|net| (net.network(), net.prefix_len()));
        prefixes.dedup();
        let mut around = Vec::with_capacity(prefixes.len());
        let mut open: Vec<usize> = Vec::new();
        for (index, prefix) in prefixes.iter().enumerate() {
            while open
                .last()
                .is_some_and(|outer| !prefixes[*outer].contains(prefix))
            {
                open.pop();
            }
            around.push(
                open.last()
                    .map_or(NONE, |outer| u32::try_from(*outer).unwrap_or(NONE)),
            );
            open.push(index);
        }
        Self { prefixes, around }
    }
}

/// Destinations of a rule: tables, each perhaps shared with other rules.
#[derive(Debug, Clone, Default)]
pub struct PrefixSet {
    tables: Vec<Arc<PrefixTable>>,
}

impl PrefixSet {
    /// Adds all prefixes of a table.
    pub fn share(&mut self, table: Arc<PrefixTable>) {
        let there = self.tables.iter().any(|other| Arc::ptr_eq(other, &table));
        if !there && !table.as_slice().is_empty() {
            self.tables.push(table);
        }
    }

    /// The tables that it is made of; none is empty.
    pub fn tables(&self) -> &[Arc<PrefixTable>] {
        &self.tables
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// How many it has; one that stands in two of its lists counts twice.
    pub fn len(&self) -> usize {
        self.tables.iter().map(|table| table.as_slice().len()).sum()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.tables.iter().flat_map(|table| table.as_slice()).copied()
    }

    /// Those that hold an address.
    pub fn holding(&self, address: IpAddr) -> impl Iterator<Item = IpNet> + '_ {
        let tables = self.tables.iter();
        tables.flat_map(move |table| table.holding(address).map(|(_, prefix)| prefix))
    }

    /// Whether one of them holds an address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.holding(address).next().is_some()
    }

    /// Whether one of them holds all of a prefix.
    pub fn covers(&self, inner: IpNet) -> bool {
        self.holding(inner.network()).any(|outer| outer.contains(&inner))
    }

    /// The nearest on either side of an address that none of them holds. If any touches a prefix around
    /// that address, one of these does, and what keeps clear of these keeps clear of all.
    pub(crate) fn nearest(&self, address: IpAddr) -> impl Iterator<Item = IpNet> + '_ {
        self.tables.iter().flat_map(move |table| {
            let (mut before, mut after) = table.beside(address);
            let sides = [before.next(), after.next()];
            sides.into_iter().flatten().map(|(_, prefix)| prefix)
        })
    }
}

impl FromIterator<IpNet> for PrefixSet {
    fn from_iter<I: IntoIterator<Item = IpNet>>(prefixes: I) -> Self {
        let mut set = Self::default();
        set.share(Arc::new(prefixes.into_iter().collect()));
        set
    }
}

/// Ports: ranges in order, apart from each other.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct PortSet(Vec<PortRange>);

impl PortSet {
    /// Whether it has none, which tests read as any.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges, in order.
    pub fn ranges(&self) -> &[PortRange] {
        &self.0
    }

    /// The range that has a port.
    pub fn range_of(&self, port: u16) -> Option<PortRange> {
        let index = self.0.partition_point(|range| range.last() < port);
        self.0.get(index).copied().filter(|range| range.contains(port))
    }

    /// The ranges on either side of a port that none of them has.
    pub(crate) fn beside(&self, port: u16) -> (Option<PortRange>, Option<PortRange>) {
        let index = self.0.partition_point(|range| range.last() < port);
        let before = index.checked_sub(1).and_then(|before| self.0.get(before));
        (before.copied(), self.0.get(index).copied())
    }

    /// Whether it has all ports of a range.
    pub fn covers(&self, range: PortRange) -> bool {
        self.range_of(range.first())
            .is_some_and(|outer| range.last() <= outer.last())
    }

    /// Whether it has a port of a range.
    pub fn meets(&self, range: PortRange) -> bool {
        let index = self.0.partition_point(|own| own.last() < range.first());
        self.0.get(index).is_some_and(|own| own.first() <= range.last())
    }
}

impl FromIterator<PortRange> for PortSet {
    fn from_iter<I: IntoIterator<Item = PortRange>>(ranges: I) -> Self {
        let mut ranges: Vec<PortRange> = ranges.into_iter().collect();
        ranges.sort_unstable();
        let mut apart: Vec<PortRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match apart.last_mut() {
                Some(last) if u32::from(range.first()) <= u32::from(last.last()) + 1 => {
                    *last = PortRange::new(last.first(), last.last().max(range.last())).unwrap_or(*last);
                }
                _ => apart.push(range),
            }
        }
        Self(apart)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    const SOME: [&str; 9] = [
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.1.0.0/16",
        "10.1.2.0/24",
        "10.200.0.0/16",
        "11.0.0.0/8",
        "10.1.2.3/32",
        "2001:db8::/32",
        "2001:db8:1::/48",
    ];

    #[test]
    fn all_prefixes_that_hold_an_address_are_found_longest_first() {
        let table: PrefixTable = nets(&SOME).into_iter().collect();
        for text in [
            "10.1.2.3",
            "10.1.2.4",
            "10.1.3.1",
            "10.199.0.1",
            "10.200.0.1",
            "12.0.0.1",
            "2001:db8:1::5",
            "2001:db9::1",
            "0.0.0.0",
            "255.255.255.255",
        ] {
            let address: IpAddr = text.parse().unwrap();
            let found: Vec<IpNet> = table.holding(address).map(|(_, net)| net).collect();
            let mut all: Vec<IpNet> = nets(&SOME).into_iter().filter(|n| n.contains(&address)).collect();
            all.sort_by_key(|net| std::cmp::Reverse(net.prefix_len()));
            assert_eq!(found, all, "{text}");
        }
    }

    #[test]
    fn the_neighbours_of_an_address_are_the_nearest_of_all() {
        let set = PrefixSet::from_iter(nets(&[
            "1.0.0.0/8",
            "1.2.0.0/16",
            "5.0.0.0/8",
            "5.5.5.5/32",
            "9.0.0.0/8",
        ]));
        for text in ["0.0.0.1", "2.0.0.1", "6.1.1.1", "8.255.0.1", "200.0.0.1"] {
            let address: IpAddr = text.parse().unwrap();
            assert!(!set.contains(address));
            let bits = |net: IpNet| match (net.network(), address) {
                (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
                _ => 0,
            };
            let nearest = set.nearest(address).map(bits).max();
            assert_eq!(nearest, set.iter().map(bits).max(), "{text}");
        }
    }

    #[test]
    fn ports_are_joined_where_they_touch() {
        let ports = |texts: &[&str]| -> PortSet { texts.iter().map(|t| t.parse().unwrap()).collect() };
        let set = ports(&["443", "80-90", "85-100", "101", "65535", "1"]);
        let shown: Vec<String> = set.ranges().iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["1", "80-101", "443", "65535"]);
        assert!(set.covers("90-101".parse().unwrap()) && !set.covers("90-102".parse().unwrap()));
        assert!(set.meets("2-80".parse().unwrap()) && !set.meets("2-79".parse().unwrap()));
        assert_eq!(set.range_of(100), Some("80-101".parse().unwrap()));
        assert_eq!(
            set.beside(200),
            (Some("80-101".parse().unwrap()), Some("443".parse().unwrap()))
        );
        assert_eq!(ports(&["65535", "65534"]).ranges().len(), 1);
    }
}
