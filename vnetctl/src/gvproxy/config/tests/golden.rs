//! Runs the table in `cases.yaml`.

use serde::Deserialize;
use serde_json::Value;

use super::*;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    /// What holds with and without a file that says nothing.
    bases: BTreeMap<String, Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    file: String,
    /// Files that are there.
    #[serde(default)]
    exists: Vec<PathBuf>,
    /// The host's search domains.
    #[serde(default)]
    search: Vec<String>,
    /// What is resolved is this...
    base: Option<String>,
    /// ...with these changes, as RFC 7386 has them.
    #[serde(default)]
    with: Value,
    #[serde(default)]
    warnings: Vec<String>,
    /// In place of a base.
    #[serde(default)]
    problems: Vec<String>,
}

fn table() -> Table {
    serde_saphyr::from_str(include_str!("cases.yaml")).unwrap()
}

impl Case {
    fn resolve(&self, arguments: &[String], text: &str) -> Result<(Value, Vec<String>), Vec<String>> {
        let search: Vec<Name> = self.search.iter().map(|name| name.parse().unwrap()).collect();
        let resolved = Files(self.exists.clone()).resolve(arguments, text, &search);
        resolved.map(|(config, warnings)| (shown(&config), warnings))
    }

    fn expected(&self, bases: &BTreeMap<String, Value>) -> Result<(Value, Vec<String>), Vec<String>> {
        let Some(base) = &self.base else {
            return Err(self.problems.clone());
        };
        let mut expected = bases[base].clone();
        patch(&mut expected, &self.with);
        Ok((expected, self.warnings.clone()))
    }
}

/// RFC 7386.
fn patch(target: &mut Value, changes: &Value) {
    let Value::Object(changes) = changes else {
        if !changes.is_null() {
            *target = changes.clone();
        }
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Value::Object(target) = target else { return };
    for (key, change) in changes {
        if change.is_null() {
            target.remove(key);
        } else {
            patch(target.entry(key).or_insert(Value::Null), change);
        }
    }
}

#[test]
fn arguments_and_file_resolve_as_in_the_table() {
    let table = table();
    let mut wrong = Vec::new();
    for case in &table.cases {
        let (found, expected) = (case.resolve(&case.args, &case.file), case.expected(&table.bases));
        if found != expected {
            let show = |result: &Result<(Value, Vec<String>), Vec<String>>| match result {
                Ok((value, warnings)) => format!("{value:#}\nwarnings {warnings:#?}"),
                Err(problems) => format!("problems {problems:#?}"),
            };
            wrong.push(format!(
                "{}\nfound {}\nexpected {}",
                case.name,
                show(&found),
                show(&expected)
            ));
        }
    }

    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    let names: std::collections::BTreeSet<_> = table.cases.iter().map(|case| &case.name).collect();
    assert_eq!(names.len(), table.cases.len());
    assert!(table.cases.len() >= 40, "{}", table.cases.len());
}

#[test]
fn what_is_resolved_is_a_file_that_resolves_to_itself() {
    let table = table();
    let mut tried = 0;
    for case in &table.cases {
        let Ok((resolved, _)) = case.resolve(&case.args, &case.file) else {
            continue;
        };
        // The file has other keys for these two.
        if resolved.get("mode").is_some() || resolved.get("policy").is_some() {
            continue;
        }
        let arguments = ["-strict", "-config", FILE].map(str::to_owned);

        let (again, _) = case.resolve(&arguments, &resolved.to_string()).unwrap();

        assert_eq!(again, resolved, "{}", case.name);
        tried += 1;
    }
    assert!(tried > 20, "{tried}");
}
