"""What the hub of the tests answers to a client that writes: a new repository, files in LFS, a commit.

A token writes below the owners that ``Hub.allow`` gave it, and reads what it writes.
"""

import base64
import json

LARGE = (".safetensors", ".parquet", ".bin", ".gz", ".zst", ".arrow")


def route(answer, parts: list[str]) -> bool:
    """Answer a request to write; tell whether it was one."""
    if answer.command == "PUT" and parts[0] == "lfs":
        answer.hub.uploaded[parts[1]] = answer.body
        answer.send(200, b"", {})
    elif answer.command != "POST":
        return False
    elif parts == ["api", "repos", "create"]:
        create(answer, json.loads(answer.body))
    elif parts == ["api", "validate-yaml"]:
        validate(answer, json.loads(answer.body)["content"])
    elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
        batch(answer, writable(answer, f"{parts[0]}/{parts[1].removesuffix('.git')}"))
    elif parts[:2] == ["api", "models"] and parts[4:5] == ["preupload"]:
        preupload(answer, writable(answer, "/".join(parts[2:4])))
    elif parts[:2] == ["api", "models"] and parts[4:5] == ["commit"]:
        commit(answer, writable(answer, "/".join(parts[2:4])))
    else:
        return False
    return True


def may_write(answer, owner: str) -> None:
    """Refuse a client whose token does not write below this owner, as the hub does."""
    token = answer.record.token
    if token not in answer.hub.owners:
        raise answer.refused(401, message="Invalid username or password.")
    if owner not in answer.hub.owners[token]:
        raise answer.refused(
            403, message=f"You don't have the rights to create a model under {owner}"
        )


def writable(answer, name: str):
    """Return a model that this client may write to."""
    repository = answer.repository("models", *name.split("/"))
    may_write(answer, name.partition("/")[0])
    return repository


def create(answer, asked: dict) -> None:
    """Make a model with a first commit that holds nothing; refuse one that is there."""
    owner, kind = asked["organization"], f"{asked.get('type', 'model')}s"
    name = f"{owner}/{asked['name']}"
    may_write(answer, owner)
    found = {"url": f"{answer.hub.address}/{name}", "name": name, "id": "0" * 24}
    if (kind, name) in answer.hub.repositories:
        words = json.dumps(found | {"error": "You already created this model repo"})
        return answer.send(409, words.encode(), {"Content-Type": "application/json"})
    private = asked.get("visibility") == "private"
    answer.hub.new(kind, name, private=private, readers=(answer.record.token,))
    answer.send_json(found)


def validate(answer, content: str) -> None:
    """Refuse a card whose front matter is no YAML or lacks what the hub asks of a model-index."""
    import yaml

    errors = []
    try:
        front = yaml.safe_load(content.split("---\n")[1])
        for model in front.get("model-index", []):
            for result in model["results"]:
                assert model["name"] and result["task"]["type"]
                assert result["dataset"]["type"] and result["dataset"]["name"]
                assert all(metric["type"] and "value" in metric for metric in result["metrics"])
    except (IndexError, KeyError, AssertionError, yaml.YAMLError) as error:
        errors = [{"message": f"{type(error).__name__}: {error}"}]
    answer.send(
        400 if errors else 200,
        json.dumps({"errors": errors, "warnings": []}).encode(),
        {"Content-Type": "application/json"},
    )


def preupload(answer, repository) -> None:
    """Say of each file how it is to be sent, and what the repository has by its name."""
    there = repository.commits[repository.commit]
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            "shouldIgnore": False,
            "oid": there[file["path"]].etag if file["path"] in there else None,
        }
        for file in json.loads(answer.body)["files"]
    ]
    answer.send_json({"files": files})


def batch(answer, repository) -> None:
    """Say for each object where it is to be put; nowhere, if it is here."""
    objects = []
    for one in json.loads(answer.body)["objects"]:
        found = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] not in answer.hub.uploaded:
            found["actions"] = {"upload": {"href": f"{answer.hub.cdn}/lfs/{one['oid']}"}}
        objects.append(found)
    answer.send_json({"transfer": "basic", "objects": objects})


def commit(answer, repository) -> None:
    """Make a commit of the lines of a request: files in it, files put before, and deletions."""
    files = dict(repository.commits[repository.commit])
    for line in answer.body.splitlines():
        entry = json.loads(line)
        key, value = entry["key"], entry["value"]
        if key == "file":
            content = base64.b64decode(value["content"])
            files[value["path"]] = answer.blob(value["path"], content, False)
        elif key == "lfsFile":
            content = answer.hub.uploaded[value["oid"]]
            assert len(content) == value["size"]
            files[value["path"]] = answer.blob(value["path"], content, True)
        elif key == "deletedFile":
            del files[value["path"]]
    made = repository.add(files)
    answer.send_json(
        {"commitOid": made, "commitUrl": f"{answer.hub.address}/{repository.name}/commit/{made}"}
    )
