//! How much a guest may send upstream by way of its lookups.
//!
//! A name that is allowed is a way out for data, a label at a time: whoever owns `example.com` reads all that
//! is asked for below it. So a policy bounds how many lookups go upstream in a second and a minute, and how
//! many *different* names of one registrable domain do in a minute. They are counted here, where every lookup
//! that is allowed passes on its way upstream, and not where verdicts are made: those are cached.
//!
//! Which domain a name belongs to, the public suffix list says (crate `psl`, compiled in). The controlplane
//! could not say it with its verdict: one verdict is for all the names in its match.
//!
//! Every count is of a window that slides, and exact. Where there is no room to count, what would have been
//! counted is refused.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ahash::{AHashMap, AHashSet, RandomState};
use vnet_proto::model::Name;

use crate::engine::Time;
use crate::message::DnsSettings;

/// Registrable domains that are counted at a time.
pub const DOMAINS_MAX: usize = 8_192;
/// Names that are counted at a time, of all domains.
pub const NAMES_MAX: usize = 131_072;
/// Lookups that are counted at a time, whatever a policy allows.
pub const QUERIES_MAX: u32 = 131_072;
/// Limits and domains told apart in one report; further ones are told without their domain.
pub const REACHED_MAX: usize = 64;
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// A limit of a policy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limit {
    /// Lookups in a second.
    QueriesPerSecond,
    /// Lookups in a minute.
    QueriesPerMinute,
    /// Different names of one domain in a minute.
    NamesPerDomain,
    /// [`DOMAINS_MAX`] or [`NAMES_MAX`].
    Room,
}

impl Limit {
    /// The key of the policy that sets it.
    pub fn key(self) -> &'static str {
        match self {
            Self::QueriesPerSecond => "dns.limits.queriesPerSecond",
            Self::QueriesPerMinute => "dns.limits.queriesPerMinute",
            Self::NamesPerDomain => "dns.limits.namesPerDomain",
            Self::Room => "dns.limits",
        }
    }
}

/// A limit that refused lookups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// Which.
    pub limit: Limit,
    /// The registrable domain; empty for the guest as a whole.
    pub domain: String,
    /// What the limit is.
    pub value: u32,
    /// How many it refused.
    pub count: u64,
}

/// The counts of one guest.
#[derive(Debug)]
pub struct Limits {
    per_second: Window,
    per_minute: Window,
    names_per_domain: u32,
    domains: AHashMap<Box<str>, Domain>,
    /// Names counted, of all domains.
    names: usize,
    /// When room was last made by force.
    swept_at: Option<Time>,
    hasher: RandomState,
    reached: BTreeMap<(Limit, String), (u32, u64)>,
}

/// What happened within the last `span`.
#[derive(Debug)]
struct Window {
    span: Duration,
    /// Zero for any number.
    limit: u32,
    log: VecDeque<Time>,
}

/// The names of one domain that went upstream within the last minute.
#[derive(Debug, Default)]
struct Domain {
    log: VecDeque<(Time, u64)>,
    seen: AHashSet<u64>,
}

impl Limits {
    /// Without limits; `seed` keys the hashes that names are told apart by, so that a guest cannot make
    /// two of them agree.
    pub fn new(seed: [u8; 32]) -> Self {
        let mut keys = seed.chunks_exact(8).map(|part| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(part);
            u64::from_le_bytes(bytes)
        });
        let mut key = || keys.next().unwrap_or_default();
        Self {
            per_second: Window::new(SECOND),
            per_minute: Window::new(MINUTE),
            names_per_domain: 0,
            domains: AHashMap::new(),
            names: 0,
            swept_at: None,
            hasher: RandomState::with_seeds(key(), key(), key(), key()),
            reached: BTreeMap::new(),
        }
    }

    /// Other limits from now on. What was counted stays counted.
    pub fn set(&mut self, settings: &DnsSettings) {
        self.per_second.set(settings.queries_per_second);
        self.per_minute.set(settings.queries_per_minute);
        self.names_per_domain = settings.names_per_domain;
        if self.names_per_domain == 0 {
            self.domains.clear();
            self.names = 0;
        }
    }

    /// Counts a lookup that is to go upstream.
    ///
    /// # Errors
    /// What to tell the guest, where a limit refuses it. It is then not counted.
    pub fn admit(&mut self, now: Time, name: &Name, query_type: u16) -> Result<(), String> {
        if !self.per_second.has_room(now) {
            let value = self.per_second.limit;
            return Err(self.refuse(Limit::QueriesPerSecond, String::new(), value));
        }
        if !self.per_minute.has_room(now) {
            let value = self.per_minute.limit;
            return Err(self.refuse(Limit::QueriesPerMinute, String::new(), value));
        }
        if self.names_per_domain != 0 {
            self.admit_name(now, name, query_type)?;
        }
        self.per_second.count(now);
        self.per_minute.count(now);
        Ok(())
    }

    /// The limits that refused lookups since the last call.
    pub fn take_reached(&mut self) -> Vec<Reached> {
        let reached = std::mem::take(&mut self.reached).into_iter();
        reached
            .map(|((limit, domain), (value, count))| Reached {
                limit,
                domain,
                value,
                count,
            })
            .collect()
    }

    fn admit_name(&mut self, now: Time, name: &Name, query_type: u16) -> Result<(), String> {
        let text = name.as_str();
        // A public suffix, or one label alone, has nobody else to belong to.
        let domain = psl::domain_str(text).unwrap_or(text);
        // The types that every connection asks for are one; a type of its own would carry 16 bits.
        let kind = if USUAL_TYPES.contains(&query_type) {
            USUAL_TYPES[0]
        } else {
            query_type
        };
        let hash = self.hasher.hash_one((text, kind));
        let (limit, known) = (self.names_per_domain, self.domains.contains_key(domain));
        if !known && self.domains.len() >= DOMAINS_MAX || self.names >= NAMES_MAX {
            self.sweep(now);
            if !known && self.domains.len() >= DOMAINS_MAX || self.names >= NAMES_MAX {
                let most = if self.names >= NAMES_MAX {
                    NAMES_MAX
                } else {
                    DOMAINS_MAX
                };
                return Err(self.refuse(
                    Limit::Room,
                    String::new(),
                    u32::try_from(most).unwrap_or(u32::MAX),
                ));
            }
        }
        let counts = self.domains.entry(domain.into()).or_default();
        self.names -= counts.expire(now);
        if counts.seen.contains(&hash) {
            return Ok(());
        }
        if counts.log.len() >= limit as usize {
            return Err(self.refuse(Limit::NamesPerDomain, domain.to_owned(), limit));
        }
        counts.log.push_back((now, hash));
        counts.seen.insert(hash);
        self.names += 1;
        Ok(())
    }

    /// Forgets what is older than a minute, at most once a second: it looks at every domain.
    fn sweep(&mut self, now: Time) {
        if self.swept_at.is_some_and(|at| now < at + SECOND) {
            return;
        }
        self.swept_at = Some(now);
        for domain in self.domains.values_mut() {
            self.names -= domain.expire(now);
        }
        self.domains.retain(|_, domain| !domain.log.is_empty());
    }

    /// Notes that a limit refused a lookup. What to tell the guest.
    fn refuse(&mut self, limit: Limit, domain: String, value: u32) -> String {
        let key = limit.key();
        let text = match limit {
            Limit::QueriesPerSecond => format!("more than {value} lookups in a second ({key})"),
            Limit::QueriesPerMinute => format!("more than {value} lookups in a minute ({key})"),
            Limit::NamesPerDomain => {
                format!("more than {value} different names of {domain} in a minute ({key})")
            }
            Limit::Room => format!("lookups of too many names in a minute ({key})"),
        };
        let mut place = (limit, domain);
        if !self.reached.contains_key(&place) && self.reached.len() >= REACHED_MAX {
            place.1.clear();
        }
        let (_, count) = self.reached.entry(place).or_insert((value, 0));
        *count += 1;
        text
    }
}

impl Window {
    fn new(span: Duration) -> Self {
        Self {
            span,
            limit: 0,
            log: VecDeque::new(),
        }
    }

    fn set(&mut self, limit: u32) {
        self.limit = limit.min(QUERIES_MAX);
        if limit == 0 {
            self.log.clear();
        }
    }

    fn has_room(&mut self, now: Time) -> bool {
        while self.log.front().is_some_and(|at| *at + self.span <= now) {
            self.log.pop_front();
        }
        self.limit == 0 || self.log.len() < self.limit as usize
    }

    fn count(&mut self, now: Time) {
        if self.limit != 0 {
            self.log.push_back(now);
        }
    }
}

impl Domain {
    /// Forgets what is older than a minute. How many names that were.
    fn expire(&mut self, now: Time) -> usize {
        let before = self.log.len();
        while let Some((at, hash)) = self.log.front()
            && *at + MINUTE <= now
        {
            self.seen.remove(hash);
            self.log.pop_front();
        }
        before - self.log.len()
    }
}

/// A, AAAA, SVCB and HTTPS (RFC 9460).
const USUAL_TYPES: [u16; 4] = [1, 28, 64, 65];

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Duration::from_secs(1_000);

    fn limits(per_second: u32, per_minute: u32, names_per_domain: u32) -> Limits {
        let mut limits = Limits::new([3; 32]);
        limits.set(&DnsSettings {
            queries_per_second: per_second,
            queries_per_minute: per_minute,
            names_per_domain,
            ..DnsSettings::default()
        });
        limits
    }

    fn admits(limits: &mut Limits, now: Time, name: &str, kind: u16) -> bool {
        limits.admit(now, &name.parse().unwrap(), kind).is_ok()
    }

    #[test]
    fn ten_thousand_names_of_one_domain_pass_only_up_to_the_limit() {
        let mut limits = limits(0, 0, 300);
        let passed = (0..10_000).filter(|n| admits(&mut limits, NOW, &format!("x{n}.a.example.com"), 16));
        assert_eq!(passed.count(), 300);
        assert!(
            admits(&mut limits, NOW, "x7.a.example.com", 16),
            "one of those that passed"
        );
        assert!(admits(&mut limits, NOW, "x.example.org", 16), "another domain");
        assert_eq!(
            limits.take_reached(),
            [Reached {
                limit: Limit::NamesPerDomain,
                domain: "example.com".to_owned(),
                value: 300,
                count: 9_700
            }]
        );
        assert!(limits.take_reached().is_empty(), "told once");
        assert!(!admits(&mut limits, NOW + MINUTE - SECOND, "late.example.com", 1));
        assert!(
            admits(&mut limits, NOW + MINUTE, "late.example.com", 1),
            "the window slides on"
        );
    }

    #[test]
    fn record_types_of_one_name_carry_no_more_than_names_do() {
        let mut limits = limits(0, 0, 10);
        let passed = (0..=u16::MAX).filter(|kind| admits(&mut limits, NOW, "example.com", *kind));
        assert_eq!(passed.count(), 9 + USUAL_TYPES.len(), "the usual ones are one");
    }

    #[test]
    fn sites_of_different_owners_below_one_public_suffix_are_counted_apart() {
        let mut limits = limits(0, 0, 1);
        for name in [
            "a.github.io",
            "b.github.io",
            "a.co.uk",
            "b.co.uk",
            "localnet",
            "1.2.0.192.in-addr.arpa",
        ] {
            assert!(admits(&mut limits, NOW, name, 1), "{name}");
        }
        assert!(!admits(&mut limits, NOW, "x.a.co.uk", 1));
        assert!(!admits(&mut limits, NOW, "2.2.0.192.in-addr.arpa", 12));
    }

    #[test]
    fn lookups_of_a_second_and_of_a_minute_are_bounded_each_by_its_own_window() {
        let mut limits = limits(5, 8, 0);
        let burst = |limits: &mut Limits, now| (0..20).filter(|_| admits(limits, now, "a.test", 1)).count();
        assert_eq!(burst(&mut limits, NOW), 5);
        assert_eq!(burst(&mut limits, NOW + SECOND), 3, "the rest of the minute's");
        assert_eq!(burst(&mut limits, NOW + SECOND * 2), 0);
        assert_eq!(burst(&mut limits, NOW + MINUTE), 5);
        let keys: Vec<_> = limits
            .take_reached()
            .iter()
            .map(|r| (r.limit.key(), r.count))
            .collect();
        let (second, minute) = ("dns.limits.queriesPerSecond", "dns.limits.queriesPerMinute");
        assert_eq!(keys, [(second, 15 + 15), (minute, 17 + 20)]);
    }

    #[test]
    fn without_limits_nothing_is_refused_and_nothing_kept() {
        let mut limits = limits(0, 0, 0);
        assert!((0..100_000).all(|n| admits(&mut limits, NOW, &format!("x{n}.example.com"), 1)));
        assert!(limits.domains.is_empty() && limits.per_minute.log.is_empty());
    }

    #[test]
    fn where_there_is_no_room_to_count_lookups_are_refused() {
        let mut limits = limits(0, 0, 100);
        for n in 0..DOMAINS_MAX {
            assert!(admits(&mut limits, NOW, &format!("d{n}.test"), 1));
        }
        assert!(!admits(&mut limits, NOW, "more.test", 1));
        assert!(
            admits(&mut limits, NOW, "x.d1.test", 1),
            "of a domain that is counted"
        );
        assert_eq!(limits.take_reached()[0].limit, Limit::Room);
        assert_eq!(limits.domains.len(), DOMAINS_MAX);
        assert!(admits(&mut limits, NOW + MINUTE, "more.test", 1));
        assert_eq!(
            (limits.domains.len(), limits.names),
            (1, 1),
            "the old ones are gone"
        );
    }

    #[test]
    fn names_in_all_are_bounded_too() {
        let mut limits = limits(0, 0, u32::MAX);
        let passed =
            (0..NAMES_MAX + 10).filter(|n| admits(&mut limits, NOW, &format!("x{n}.example.com"), 1));
        assert_eq!(passed.count(), NAMES_MAX);
    }

    #[test]
    fn a_report_has_a_bounded_number_of_domains() {
        let mut limits = limits(0, 0, 1);
        for n in 0..REACHED_MAX + 50 {
            admits(&mut limits, NOW, &format!("a.d{n}.test"), 1);
            admits(&mut limits, NOW, &format!("b.d{n}.test"), 1);
        }
        let reached = limits.take_reached();
        assert_eq!(reached.len(), REACHED_MAX + 1);
        let rest = reached.iter().find(|r| r.domain.is_empty()).unwrap();
        assert_eq!(rest.count, 50);
    }
}
