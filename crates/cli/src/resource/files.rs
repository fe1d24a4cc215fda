//! From what `-f` names to resources: a file, a folder of `.yaml` and `.yml` files, or standard input.

use crate::failure::{Failure, Outcome};
use crate::resource::node::{FileError, Node};
use crate::resource::{Kind, RESOURCES_MAX, Resource};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Largest file that is read, in bytes: the most resources of one apply, each with a full page of rules.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Most files of one folder, so that a mistyped path such as `/` ends soon.
const FILES_MAX: usize = 1_000;

/// Everything that the paths hold, in the order of the paths and the files' names.
///
/// # Errors
/// The first thing that is wrong; nothing was sent anywhere.
pub(crate) fn load(paths: &[PathBuf]) -> Outcome<Vec<Resource>> {
    let mut resources = Vec::new();
    for path in paths {
        for file in files(path)? {
            let text = read(&file)?;
            for node in Node::parse_all(&file.to_string(), &text).map_err(|error| unusable(&error))? {
                resources.push(Resource::read(node).map_err(|error| unusable(&error))?);
            }
            // Asked after each file, so that what is read stays bounded however many files there are.
            if resources.len() > RESOURCES_MAX {
                let what =
                    format!("up to {file} there are more than the {RESOURCES_MAX} resources of one apply");
                return Err(Failure::fault(what).next("apply them in parts"));
            }
        }
    }
    let seen = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
    if resources.is_empty() {
        return Err(Failure::fault(format!("there is no resource in {seen}"))
            .next("write one, for example as in docs/resources.md"));
    }
    unique(&resources)?;
    Ok(resources)
}

fn unusable(error: &FileError) -> Failure {
    Failure::fault(error.to_string())
        .next("mend the file; `weft check -f FILE` tells whether it is right now. Nothing was changed")
}

fn unique(resources: &[Resource]) -> Outcome<()> {
    let mut seen: BTreeMap<(Kind, &str), &Resource> = BTreeMap::new();
    for resource in resources {
        if let Some(first) = seen.insert((resource.kind, &resource.name), resource) {
            let message = format!("is there twice, first in {}", first.explain("", "").place);
            return Err(unusable(&resource.explain("", &message)));
        }
    }
    Ok(())
}

/// One thing to read.
#[derive(Debug)]
enum Source {
    Stdin,
    File(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("<stdin>"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// The files that a path stands for, in the order of their names.
fn files(path: &Path) -> Outcome<Vec<Source>> {
    if path == Path::new("-") {
        return Ok(vec![Source::Stdin]);
    }
    let unreadable = |error: io::Error| {
        let what = format!("{} cannot be read: {error}", path.display());
        Failure::fault(what).next("name a file, a folder with .yaml files, or - for standard input")
    };
    if !fs::metadata(path).map_err(unreadable)?.is_dir() {
        return Ok(vec![Source::File(path.to_owned())]);
    }
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        let is_yaml = file.extension().is_some_and(|ending| ending == "yaml" || ending == "yml");
        if is_yaml && file.is_file() {
            files.push(file);
        }
        if files.len() > FILES_MAX {
            return Err(Failure::fault(format!("{} has more than {FILES_MAX} files", path.display())));
        }
    }
    files.sort();
    Ok(files.into_iter().map(Source::File).collect())
}

fn read(source: &Source) -> Outcome<String> {
    let mut text = String::new();
    let input: io::Result<Box<dyn Read>> = match source {
        Source::Stdin => Ok(Box::new(io::stdin().lock())),
        Source::File(path) => fs::File::open(path).map(|file| Box::new(file) as Box<dyn Read>),
    };
    input
        .and_then(|input| input.take(FILE_BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(|error| Failure::fault(format!("{source} cannot be read: {error}")))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(Failure::fault(format!("{source} is larger than {} MiB", FILE_BYTES_MAX >> 20)));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_resources_than_one_apply_takes_are_refused_before_all_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let services = |file: usize| {
            let service =
                |n| format!("---\nkind: Service\nname: d/s{file}-{n}\nports: [{{ name: a, port: 1 }}]\n");
            (0..600).map(service).collect::<String>()
        };
        for file in 0..2 {
            fs::write(dir.path().join(format!("{file}.yaml")), services(file)).unwrap();
        }
        fs::write(dir.path().join("2.yaml"), "not a resource").unwrap();
        let refused = load(&[dir.path().to_owned()]).unwrap_err().to_string();
        assert!(refused.contains("1.yaml there are more than the 1000 resources"), "{refused}");
        assert_eq!(load(&[dir.path().join("0.yaml")]).unwrap().len(), 600);
    }
}
