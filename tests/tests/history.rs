//! Policies and the history: what a file would have changed, a file made of what happened, rules that come with
//! the program, and whether what is cached is what is decided.
#![cfg(target_os = "linux")]

use serde_json::Value;
use vnet_tests::{Answer, Dns, World, eventually, http, staged};

/// Names, and the servers behind them.
fn servers(world: &World) -> [vnet_tests::Server; 3] {
    Dns::serve(
        world.internet(),
        "203.0.113.10:53",
        &[
            ("one.example.com", Answer::A("203.0.113.10")),
            ("two.example.com", Answer::A("203.0.113.10")),
            ("other.example.net", Answer::A("198.51.100.7")),
            ("pypi.org", Answer::A("203.0.113.10")),
        ],
    );
    [
        http(world.internet(), "203.0.113.10:80"),
        http(world.internet(), "198.51.100.7:8080"),
        http(world.internet(), "203.0.113.10:443"),
    ]
}

const BUILD: &str = "curl -sS http://one.example.com/; curl -sS http://two.example.com/; \
    curl -sS http://198.51.100.7:8080/; getent ahostsv4 other.example.net >/dev/null; echo $?";
const BUILT: &str =
    "this is 203.0.113.10:80 at /\nthis is 203.0.113.10:80 at /\nthis is 198.51.100.7:8080 at /\n0\n";

#[test]
fn what_was_observed_becomes_a_policy_that_allows_it_and_nothing_else() {
    staged(
        what_was_observed_becomes_a_policy_that_allows_it_and_nothing_else,
        |world| {
            let _servers = servers(world);
            let observed = world.script(&["--mode", "observe", "--vm", "build"], BUILD);
            assert_eq!(observed.stdout, BUILT, "{observed:?}");

            let suggested = world.try_vnetctl(&["policy", "suggest", "--since", "1h", "--vm", "build"]);
            assert_eq!(suggested.code, 0, "{suggested:?}");
            assert!(
                suggested.stderr.contains("nothing would be decided otherwise"),
                "{suggested:?}"
            );
            for part in [
                "\"*.example.com\"",
                "198.51.100.7/32",
                "allowedDomains",
                "other.example.net",
                "tests:",
            ] {
                assert!(
                    suggested.stdout.contains(part),
                    "{part} is not in {}",
                    suggested.stdout
                );
            }
            assert!(
                !suggested.stdout.contains("203.0.113.10"),
                "names, not addresses: {}",
                suggested.stdout
            );
            let file = world.file("suggested.yaml", &suggested.stdout);
            let file = file.to_str().unwrap();
            world.vnetctl(&["policy", "check", file]);
            assert!(
                world
                    .vnetctl(&["policy", "test", file])
                    .contains("come out as its tests say")
            );
            let same = world.try_vnetctl(&["policy", "diff", file, "--vm", "build"]);
            assert_eq!((same.code, same.stdout.as_str()), (0, ""), "{same:?}");

            let again = world.script(&["--network-policy", file, "--vm", "again"], BUILD);
            assert_eq!(again.stdout, BUILT, "{again:?}");
            let other = "curl -sS http://203.0.113.10:443/ 2>/dev/null; echo $?; \
            curl -sS http://other.example.net:8081/ 2>/dev/null; echo $?; getent hosts example.net; echo $?";
            let refused = world.script(&["--network-policy", file, "--vm", "again"], other);
            assert_eq!(refused.stdout, "7\n7\n2\n", "{refused:?}");
        },
    );
}

#[test]
fn a_diff_lists_exactly_what_a_file_would_change() {
    staged(a_diff_lists_exactly_what_a_file_would_change, |world| {
        let _servers = servers(world);
        world.script(
            &["--allow", "tcp 203.0.113.0/24:80", "--allow", "domain one.example.com:80", "--vm", "web"],
            "curl -sS http://203.0.113.10/; curl -sS http://203.0.113.10/; curl -sS http://198.51.100.7:8080/",
        );
        let same = world.file(
            "same.yaml",
            "version: 1\nrules:\n  - {action: allow, cidr: 203.0.113.10/32, ports: [80], protocol: tcp}\n",
        );
        let same = world.try_vnetctl(&["policy", "diff", same.to_str().unwrap(), "--since", "1h"]);
        assert_eq!((same.code, same.stdout.as_str()), (0, ""), "{same:?}");
        assert!(
            same.stderr
                .contains("replayed 3 flows, 0 lookups and 0 questions: nothing"),
            "{same:?}"
        );

        let other = world.file(
            "other.yaml",
            "version: 1\nrules:\n  - {name: elsewhere, action: allow, cidr: 198.51.100.0/24, ports: [8080]}\n",
        );
        let other = other.to_str().unwrap();
        let changed = world.try_vnetctl(&["policy", "diff", other, "-o", "json"]);
        assert_eq!(changed.code, 3, "{changed:?}");
        let changed: Value = serde_json::from_str(&changed.stdout).unwrap();
        let mut lines: Vec<String> = changed["changes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                format!(
                    "{} {} x{} {} -> {} by {}{}",
                    text(&c["vm"]),
                    text(&c["target"]["address"]["prefix"]),
                    text(&c["count"]),
                    text(&c["before"]),
                    text(&c["after"]),
                    text(&c["afterReason"]["step"]),
                    text(&c["afterReason"]["subject"]),
                )
            })
            .collect();
        lines.sort();
        assert_eq!(
            lines,
            [
                "web 198.51.100.7 x1 ACTION_DENY -> ACTION_ALLOW by ruleelsewhere",
                "web 203.0.113.10 x2 ACTION_ALLOW -> ACTION_DENY by defaultdeny",
            ]
        );
        let table = world.try_vnetctl(&["policy", "diff", other]);
        assert!(
            table.stdout.contains("elsewhere") && table.stderr.contains("3 would be decided otherwise"),
            "{table:?}"
        );
        let none = world.try_vnetctl(&["policy", "diff", other, "--vm", "nobody"]);
        assert_eq!(none.code, 0, "{none:?}");
        let wrong = world.file("wrong.yaml", "ruels: []\n");
        assert_eq!(
            world
                .try_vnetctl(&["policy", "diff", wrong.to_str().unwrap()])
                .code,
            1
        );
    });
}

#[test]
fn answers_become_a_file() {
    staged(answers_become_a_file, |world| {
        let [web, ..] = servers(world);
        let run = world.run(
            &["--secure-mode", "--vm", "web"],
            &["curl", "-sS", "http://203.0.113.10/"],
        );
        let id = world.first_pending_id();
        world.vnetctl(&["approve", &id, "--reason", "for the build"]);
        assert_eq!(run.wait().code, 0);
        assert_eq!(web.connections(), 1);
        // The grant ended with its VM, and what was answered is not lost with it.
        eventually("the grant ends", || world.list(&["grants", "list"]).is_empty());
        let file = world.try_vnetctl(&["policy", "suggest", "--from-grants", "--since", "1h"]);
        assert_eq!(file.code, 0, "{file:?}");
        assert!(
            file.stdout.contains("for the build") && file.stderr.contains("made from 1 grants"),
            "{file:?}"
        );
        let file = world.file("answers.yaml", &file.stdout);
        world.vnetctl(&["policy", "check", file.to_str().unwrap()]);
        let flags = ["--network-policy", file.to_str().unwrap(), "--vm", "web"];
        let ended = world.script(
            &flags,
            "curl -sS http://203.0.113.10/; curl -sS http://198.51.100.7:8080/ 2>/dev/null; echo $?",
        );
        assert_eq!(ended.stdout, "this is 203.0.113.10:80 at /\n7\n", "{ended:?}");
    });
}

#[test]
fn presets_are_listed_printed_and_given_to_a_run() {
    staged(presets_are_listed_printed_and_given_to_a_run, |world| {
        let _servers = servers(world);
        let listed = world.vnetctl(&["policy", "presets"]);
        for name in ["npm", "pypi", "crates", "github", "debian"] {
            assert!(listed.lines().any(|line| line.starts_with(name)), "{listed}");
            let file = world.file(
                &format!("{name}.yaml"),
                &world.vnetctl(&["policy", "presets", name]),
            );
            world.vnetctl(&["policy", "check", file.to_str().unwrap()]);
        }
        let documents = world.list(&["policy", "presets"]);
        assert_eq!(documents.len(), listed.lines().count());
        let one = world.vnetctl(&["policy", "presets", "npm", "-o", "json"]);
        let one: serde_json::Value = serde_json::from_str(&one).unwrap();
        let file = world.vnetctl(&["policy", "presets", "npm"]);
        assert_eq!((&one["name"], &one["document"]), (&"npm".into(), &file.into()));
        assert!(documents.contains(&one), "{documents:?}");
        let fetch = "curl -sk -m 5 https://pypi.org/ >/dev/null 2>&1; echo $?; curl -sS http://pypi.org/ 2>/dev/null; echo $?; \
            getent hosts one.example.com; echo $?";
        let ended = world.script(&["--preset", "pypi"], fetch);
        assert_eq!(ended.stdout, "35\n7\n2\n", "{ended:?}");
        let unknown = world.run(&["--preset", "pipy"], &["true"]).wait();
        assert_eq!(unknown.code, 125, "{unknown:?}");
        assert!(unknown.stderr.contains("did you mean pypi?"), "{unknown:?}");
        assert_eq!(world.try_vnetctl(&["policy", "presets", "pipy"]).code, 2);
    });
}

#[test]
fn what_is_cached_is_what_is_decided() {
    staged(what_is_cached_is_what_is_decided, |world| {
        let _servers = servers(world);
        let file = world.file(
            "policy.yaml",
            "version: 1\nrules:\n  - {action: allow, cidr: 203.0.113.0/24, ports: [80], protocol: tcp}\n  \
             - {action: deny, cidr: 198.51.0.0/16}\n  - {action: allow, domains: [\"*.example.com\"], ports: [80]}\n",
        );
        let mut run = world.run(
            &["--network-policy", file.to_str().unwrap(), "--vm", "web"],
            &[
                "sh",
                "-c",
                "curl -sS http://one.example.com/; curl -sS http://203.0.113.10/; curl -sS http://198.51.100.7:8080/;
                 curl -sS http://192.0.2.1/; getent hosts example.net; echo cached; until [ -e go ]; do sleep 0.05; done",
            ],
        );
        run.prints("cached");
        let verified = world.try_vnetctl(&[
            "dataplane",
            "verify",
            "--vm",
            "web",
            "--seed",
            "7",
            "--points",
            "100",
        ]);
        assert_eq!(verified.code, 0, "{verified:?}");
        assert!(verified.stderr.contains("(seed 7): 0 differ"), "{verified:?}");
        let answer = world.json(&["dataplane", "verify"]);
        let number = |field: &str| {
            answer[field]
                .as_str()
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(0)
        };
        assert!(number("verdicts") >= 5 && number("points") > 20, "{answer}");
        assert!(answer["mismatches"].is_null(), "{answer}");
        world.file("go", "");
        assert_eq!(run.wait().code, 0);
        let nobody = world.try_vnetctl(&["dataplane", "verify", "--vm", "nobody"]);
        assert_eq!(nobody.code, 1, "{nobody:?}");
    });
}
