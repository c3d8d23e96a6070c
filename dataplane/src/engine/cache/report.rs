//! What the cache holds, told to whoever wants to check it.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use vnet_proto::model::{FlowMatch, Match, Name};

use super::{Cache, Decision, Shape};
use crate::engine::Time;
use crate::message::CachedVerdict;

/// Verdicts told at once.
const REPORTED_MAX: usize = 32_768;

impl Cache {
    /// What is cached and holds now, flows before lookups before aliases, at most `REPORTED_MAX` of it; and how much that
    /// is in all. `names_of` says which names are bound to an address.
    pub fn report(&self, now: Time, names_of: impl Fn(IpAddr) -> Vec<Name>) -> (Vec<CachedVerdict>, usize) {
        let flows = self.shapes.iter().flat_map(|shape| {
            shape.table.iter().flat_map(move |(key, regions)| {
                regions.iter().map(move |region| {
                    let found = FlowMatch {
                        protocol: shape.protocol,
                        prefix: shape.prefix(*key),
                        ports: region.ports,
                        names_consulted: region.names_consulted,
                    };
                    (Match::Flow(found), &region.decision)
                })
            })
        });
        let lookups = self.lookups.all().map(|(found, d)| (Match::Lookup(found), d));
        let aliases = self.aliases.all().map(|(found, d)| (Match::Alias(found), d));
        let holding = flows
            .chain(lookups)
            .chain(aliases)
            .filter(|(_, decision)| self.holds(now, decision));
        let (mut told, mut in_all) = (Vec::new(), 0);
        for (found, decision) in holding {
            in_all += 1;
            if told.len() < REPORTED_MAX {
                told.push(cached(found, decision, &names_of));
            }
        }
        (told, in_all)
    }
}

impl Shape {
    fn prefix(&self, key: super::ShapeKey) -> IpNet {
        let address = self.address(key);
        // The length is that of a prefix of this family already.
        IpNet::new(address, self.prefix_length).unwrap_or_else(|_| IpNet::from(address))
    }
}

fn cached(found: Match, decision: &Arc<Decision>, names_of: impl Fn(IpAddr) -> Vec<Name>) -> CachedVerdict {
    let names = match &found {
        Match::Flow(flow) if flow.names_consulted => names_of(flow.prefix.addr()),
        Match::Flow(_) | Match::Lookup(_) | Match::Alias(_) => Vec::new(),
    };
    CachedVerdict {
        action: decision.action,
        found,
        epoch: decision.epoch,
        would_deny: decision.would_deny,
        guards: decision.standing.guards,
        neighbour: decision.standing.neighbour,
        grant: decision.grant.clone(),
        names,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use vnet_proto::model::{LookupMatch, PortRange, Protocol, VerdictAction, parse_prefix};

    use super::*;
    use crate::engine::cache::Standing;
    use crate::engine::cache::tests::{EPOCH, verdict_on};

    fn put(cache: &mut Cache, action: VerdictAction, found: Match) {
        let verdict = verdict_on(action, found);
        let decision = Arc::new(Decision::new(Time::ZERO, &verdict, Standing::default(), None));
        cache.install(&verdict, &decision, None);
    }

    fn flow(prefix: &str, ports: &str, names_consulted: bool) -> Match {
        Match::Flow(FlowMatch {
            protocol: Protocol::Tcp,
            prefix: parse_prefix(prefix).unwrap(),
            ports: ports.parse().unwrap(),
            names_consulted,
        })
    }

    fn cache() -> Cache {
        let mut cache = Cache::default();
        cache.revoke(EPOCH);
        cache.renew(EPOCH, Duration::from_secs(60));
        cache
    }

    #[test]
    fn what_is_told_is_what_was_installed() {
        let name = || "a.test".parse::<Name>().unwrap();
        let mut cache = cache();
        let installed = [
            flow("192.0.2.0/24", "443", false),
            flow("0.0.0.0/1", "1-65535", false),
            flow("2001:db8::7/128", "80", true),
            Match::Lookup(LookupMatch::Exact(name())),
            Match::Lookup(LookupMatch::Subdomains(name())),
            Match::Lookup(LookupMatch::Any),
            Match::Alias(LookupMatch::Exact(name())),
            Match::Alias(LookupMatch::Any),
        ];
        for found in &installed {
            put(&mut cache, VerdictAction::Allow, found.clone());
        }
        let (told, in_all) = cache.report(Time::ZERO, |_| vec![name()]);
        assert_eq!(in_all, installed.len());
        for found in &installed {
            let one = told.iter().find(|one| one.found == *found).expect("it is told");
            let consulted = matches!(found, Match::Flow(flow) if flow.names_consulted);
            assert_eq!(one.names.len(), usize::from(consulted));
        }
        // What no longer holds is not told: it answers nothing.
        assert_eq!(cache.report(Duration::from_secs(61), |_| Vec::new()).1, 0);
    }

    #[test]
    fn more_than_the_limit_is_counted_and_not_told() {
        let mut cache = cache();
        for n in 0..=REPORTED_MAX {
            let address = Ipv4Addr::from(0x0102_0000 + u32::try_from(n).unwrap());
            let found = FlowMatch {
                protocol: Protocol::Tcp,
                prefix: IpNet::from(IpAddr::from(address)),
                ports: PortRange::one(443),
                names_consulted: false,
            };
            put(&mut cache, VerdictAction::Deny, Match::Flow(found));
        }
        let (told, in_all) = cache.report(Time::ZERO, |_| Vec::new());
        assert_eq!((told.len(), in_all), (REPORTED_MAX, REPORTED_MAX + 1));
    }
}
