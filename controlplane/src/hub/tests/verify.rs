//! What dataplanes have cached, decided anew.

use super::*;
use crate::hub::verify::MISMATCHES_MAX;

/// A dataplane that says that these verdicts are what it has cached.
async fn verified(
    rig: &Rig,
    dp: &mut FakeDataplane,
    cached: Vec<v1::CachedVerdict>,
    seed: u64,
) -> v1::VerifyVerdictsResponse {
    let hub = std::sync::Arc::clone(&rig.hub);
    dp.told();
    let asked = tokio::spawn(async move { hub.verify_verdicts(None, seed, 16).await.unwrap() });
    let command = loop {
        tokio::task::yield_now().await;
        let command = dp.told().into_iter().find_map(|told| match told {
            Told::Command(command) => Some(command),
            _ => None,
        });
        if let Some(command) = command {
            break command;
        }
    };
    assert_eq!(
        command.command,
        Some(v1::command::Command::ReportVerdicts(v1::ReportVerdicts { vm: 1 }))
    );
    dp.say(Message::Ack(v1::Ack {
        command_id: command.command_id,
        verdicts_in_all: cached.len() as u64 + 3,
        verdicts: cached,
        ..Default::default()
    }));
    asked.await.unwrap()
}

/// As the dataplane keeps a verdict that it was given.
fn kept(verdict: &v1::Verdict) -> v1::CachedVerdict {
    v1::CachedVerdict {
        action: verdict.action,
        r#match: Some(match verdict.r#match.clone().unwrap() {
            v1::verdict::Match::Flow(flow) => v1::cached_verdict::Match::Flow(flow),
            v1::verdict::Match::Lookup(lookup) => v1::cached_verdict::Match::Lookup(lookup),
        }),
        epoch: verdict.epoch,
        would_deny: verdict.would_deny,
        ..Default::default()
    }
}

const RULES: &str = "version: 1\nrules:\n  - {action: allow, cidr: 192.0.2.0/24, ports: [443], protocol: tcp}\n  \
    - {action: drop, cidr: 198.51.100.0/24}\n  - {action: allow, domains: [\"*.example.com\"]}\n  - {action: deny, domains: [\"*.evil.test\"]}\n";

#[tokio::test]
async fn what_was_given_is_what_is_decided() {
    let rig = Rig::open();
    rig.apply(RULES);
    let mut dp = rig.dataplane("web");
    let mut cached = Vec::new();
    for destination in [
        "192.0.2.7:443",
        "192.0.2.7:80",
        "198.51.100.9:1",
        "203.0.113.1:443",
        "127.0.0.1:80",
    ] {
        cached.push(kept(&dp.verdict(flow(destination, &[]))));
    }
    for name in ["a.example.com", "example.com", "other.test"] {
        cached.push(kept(&dp.verdict(lookup(name, 1))));
    }
    for name in ["other.test", "a.evil.test"] {
        cached.push(kept(&dp.verdict(alias(name))));
    }
    let named = dp.verdict(flow("203.0.113.7:8443", &["a.example.com"]));
    cached.push(v1::CachedVerdict {
        names: vec!["a.example.com".to_owned()],
        ..kept(&named)
    });
    let answer = verified(&rig, &mut dp, cached, 7).await;
    assert_eq!(answer.mismatches, [], "{answer:?}");
    assert_eq!(
        (answer.verdicts, answer.left_out, answer.vms, answer.seed),
        (11, 3, 1, 7)
    );
    assert!(answer.points > 60, "{answer:?}");
}

#[tokio::test]
async fn a_verdict_that_is_too_wide_or_wrong_is_found_and_named() {
    let rig = Rig::open();
    rig.apply(RULES);
    let mut dp = rig.dataplane("web");
    let right = kept(&dp.verdict(flow("192.0.2.7:443", &[])));
    let wide = v1::CachedVerdict {
        r#match: Some(v1::cached_verdict::Match::Flow(v1::FlowMatch {
            protocol: v1::Protocol::Tcp.into(),
            prefix: vec![192, 0, 2, 0],
            prefix_length: 23,
            first_port: 443,
            last_port: 443,
            names_consulted: false,
        })),
        ..right.clone()
    };
    let answer = verified(&rig, &mut dp, vec![right.clone(), wide], 7).await;
    assert!(answer.mismatches_in_all >= 1, "{answer:?}");
    let found = &answer.mismatches[0];
    assert_eq!(
        (found.vm.as_str(), found.r#match.as_str()),
        ("web", "tcp 192.0.2.0/23:443")
    );
    assert!(found.point.starts_with("tcp 192.0.3."), "{found:?}");
    assert_eq!((found.cached, found.decided), (ALLOW, DENY));

    let wrong = v1::CachedVerdict {
        action: DENY,
        ..right
    };
    let answer = verified(&rig, &mut dp, vec![wrong], 7).await;
    assert_eq!(answer.mismatches_in_all, answer.points);
}

#[tokio::test]
async fn what_a_change_voided_meanwhile_is_no_mismatch() {
    let rig = Rig::open();
    rig.apply(RULES);
    let mut dp = rig.dataplane("web");
    let cached = kept(&dp.verdict(flow("192.0.2.7:443", &[])));
    rig.apply("version: 1\n");
    let answer = verified(&rig, &mut dp, vec![cached], 7).await;
    assert_eq!(
        (answer.outdated, answer.verdicts, answer.mismatches_in_all),
        (1, 0, 0)
    );
}

#[tokio::test]
async fn points_come_of_the_seed_and_malformed_verdicts_are_counted() {
    let rig = Rig::open();
    rig.apply(RULES);
    let mut dp = rig.dataplane("web");
    let cached = v1::CachedVerdict {
        action: ALLOW,
        ..kept(&dp.verdict(flow("203.0.113.1:443", &[])))
    };
    let broken = v1::CachedVerdict {
        action: v1::Action::Ask.into(),
        ..cached.clone()
    };
    let points = |answer: v1::VerifyVerdictsResponse| -> Vec<String> {
        answer.mismatches.into_iter().map(|m| m.point).collect()
    };
    let first = verified(&rig, &mut dp, vec![cached.clone(), broken], 7).await;
    assert_eq!(first.left_out, 4);
    let first = points(first);
    assert!(first.len() > 10);
    assert_eq!(
        points(verified(&rig, &mut dp, vec![cached.clone()], 7).await),
        first
    );
    assert_ne!(points(verified(&rig, &mut dp, vec![cached], 8).await), first);
}

#[tokio::test]
async fn more_differences_than_are_told_are_counted() {
    let rig = Rig::open();
    rig.apply(RULES);
    let mut dp = rig.dataplane("web");
    let wrong = v1::CachedVerdict {
        action: ALLOW,
        ..kept(&dp.verdict(flow("203.0.113.1:443", &[])))
    };
    let answer = verified(&rig, &mut dp, vec![wrong; 100], 7).await;
    assert_eq!(answer.mismatches.len(), MISMATCHES_MAX);
    assert!(
        answer.mismatches_in_all > MISMATCHES_MAX as u64,
        "{}",
        answer.mismatches_in_all
    );
}

#[tokio::test]
async fn without_a_vm_there_is_nothing_to_verify() {
    let rig = Rig::open();
    let refused = rig.hub.verify_verdicts(None, 1, 1).await.unwrap_err();
    assert!(matches!(refused, Refusal::NotFound(_)), "{refused}");
}
